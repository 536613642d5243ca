#!/usr/bin/env bash
# score.sh EVALUATE PAGE TITLE RUN ...: ask the start model and those of the runs the report prompts, and write the page. run.sh
# and arms.sh call it, with their variables. A model is named after its folder: bfpo-0/round-1 is bfpo-0-round-1.
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
evaluate=$1 page=$2 title=$3 runs=("${@:4}")
models="{name: start, model: $MODEL}"
for run in "${runs[@]}"; do
    name=${run#"$OUT/"}
    models+=", {name: ${name//\//-}, model: $run/model}"
done
"$BFPO" evaluate --config "$HERE/evaluate.yaml" --set "suites.folders=[$OUT/suites]" --set "threads=$THREADS" \
    --set "suites.use=[$(printf '%s\n' "$OUT"/suites/*.yaml | paste -sd,)]" --set "models=[$models]" --out "$evaluate" --resume
"$BFPO" report "${runs[@]}" "$evaluate" --out "$page" --title "$title"
echo "the page is $page"
