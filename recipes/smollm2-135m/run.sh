#!/usr/bin/env bash
# The whole recipe; `make real` calls it. MODEL is the start model (folder or hub id), DATA a folder with the data (empty: the
# hub), OUT the folder of the runs. A finished stage is skipped and an interrupted one continues, so run it again at any time.
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
DATA=${DATA:-}
OUT=${OUT:-runs/real}
BFPO=${BFPO:-bfpo}
PYTHON=${PYTHON:-python}

step() { # NAME: a data step of data.py, once
    if [ ! -e "$OUT/.$1.done" ]; then
        "$PYTHON" "$HERE/data.py" "$1" --out "$OUT" ${DATA:+--data "$DATA"}
        touch "$OUT/.$1.done"
    fi
}
answers() { # FOLDER MODEL PROMPTS TOKENS: greedy answers
    "$BFPO" generate --model "$2" --prompts "$OUT/prompts/$3.jsonl" --out "$OUT/$1" --set "max_new_tokens=$4" \
        --set temperature=0 --set dtype=bfloat16 --set batch_size=64 --set threads=1 --resume
}
train() { # FOLDER MODEL BUFFER, further settings
    "$BFPO" train --config "$HERE/train.yaml" --set "model=$2" --set "data.files=[$OUT/main.jsonl]" \
        --set "buffer.files=[$OUT/$3.jsonl]" "${PROBE[@]}" --out "$OUT/$1" --resume "${@:4}"
}

PROBE=(--set "probe.harmful=[$OUT/prompts/dev_harmful.jsonl]" --set "probe.harmless=[$OUT/prompts/dev_harmless.jsonl]")

mkdir -p "$OUT"
step prompts
answers start-harmless "$MODEL" train_harmless 64
answers start-harmful "$MODEL" pairs_harmful 48
step sft
"$BFPO" sft --config "$HERE/sft.yaml" --set "model=$MODEL" --set "data.files=[$OUT/sft.jsonl]" "${PROBE[@]}" \
    --out "$OUT/sft" --resume
step pairs
train round-1 "$OUT/sft/model" buffer
# The second round: harmless prompts that the model now refuses, with the start model's answers to them.
answers round-1-harmless "$OUT/round-1/model" pairs_harmless 12
step refused
answers start-more "$MODEL" more_harmless 40
step second-pairs
train round-2 "$OUT/round-1/model" buffer-2 --set max_steps=60 --set buffer_weight=3 --set buffer.limit=null
"$BFPO" evaluate --config "$HERE/evaluate.yaml" --set "suites.folders=[$OUT/suites]" \
    --set "suites.use=[$(printf '%s\n' "$OUT"/suites/*.yaml | paste -sd,)]" \
    --set "models=[{name: start, model: $MODEL}, {name: sft, model: $OUT/sft/model}, {name: round-1, model: $OUT/round-1/model}, {name: round-2, model: $OUT/round-2/model}]" \
    --out "$OUT/evaluate" --resume
"$BFPO" report "$OUT/sft" "$OUT/round-1" "$OUT/round-2" "$OUT/evaluate" --out "$OUT/report.html" --title "SmolLM2-135M-Instruct, made safe"
echo "the page is $OUT/report.html"
