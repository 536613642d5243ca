#!/usr/bin/env bash
# score.sh EVALUATE PAGE TITLE RUN ...: ask the start model and those of the runs the report prompts, and write the page. run.sh
# and arms.sh call it, with their variables. A model is named after its folder: bfpo-0/round-1 is bfpo-0-round-1.
# GATE: test the model of the last run by gate.yaml. LABELS: labels.jsonl of `bfpo annotate EVALUATE`.
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
evaluate=$1 page=$2 title=$3 runs=("${@:4}")
models="{name: start, model: $MODEL}"
for run in "${runs[@]}"; do
    name=${run#"$OUT/"} name=${name//\//-}
    models+=", {name: $name, model: $run/model}"
done
more=()
if [ -n "${LABELS:-}" ]; then # an evaluation of its own for each version of the labels, with the answers of the one without
    more=(--set "labels=$LABELS" --set "suites.reuse=$evaluate")
    evaluate+=-people-$(cksum <"$LABELS" | cut -d ' ' -f 1)
fi
if [ -e "$evaluate/config.yaml" ] && ! grep -q '^coherence:$' "$evaluate/config.yaml"; then
    echo "$evaluate was begun without coherence.model and goes on so: coherence is read from the text alone"
    more+=(--set coherence=null)
fi
"$BFPO" evaluate --config "$HERE/evaluate.yaml" --set "suites.folders=[$OUT/suites]" --set "threads=$THREADS" \
    --set "suites.use=[$(printf '%s\n' "$OUT"/suites/*.yaml | paste -sd,)]" --set "models=[$models]" \
    ${more[@]+"${more[@]}"} --out "$evaluate" --resume
if [ -n "${GATE:-}" ]; then
    status=0
    "$BFPO" gate "$evaluate/models/$name" --against "$evaluate/models/start" --config "$HERE/gate.yaml" || status=$?
    case $status in 0 | 3 | 4) ;; *) exit "$status" ;; esac # pass, fail, cannot be told
fi
"$BFPO" report "${runs[@]}" "$evaluate" --out "$page" --title "$title"
echo "the page is $page"
