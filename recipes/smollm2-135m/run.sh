#!/usr/bin/env bash
# The whole recipe; `make real` calls it. A finished stage is skipped and an interrupted one continues, so run it again at any
# time. MODEL: the start model (folder or hub id). DATA: a folder with the data (empty: the hub). OUT: the folder of the runs.
# LABELS: labels.jsonl of `bfpo annotate` on the answers of the scores; the page then has the rates by people.
# METHOD: bfpo, bfpo_squared, dpo_safe_first or safedpo, or sft-more: SFT at the compute of both rounds in their place. SEED: of SFT and of the pairs.
# arms.sh runs it for several of them.
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
DATA=${DATA:-}
OUT=${OUT:-runs/real}
METHOD=${METHOD:-bfpo}
SEED=${SEED:-0}
THREADS=${THREADS:-2}
BFPO=${BFPO:-bfpo}
PYTHON=${PYTHON:-python}
case $METHOD in
bfpo | bfpo_squared | dpo_safe_first | safedpo | sft-more) ;;
*) echo "error: METHOD: got $METHOD; allowed: bfpo, bfpo_squared, dpo_safe_first, safedpo, sft-more" >&2; exit 2 ;;
esac
SFT=$OUT/sft-$SEED ARM=$OUT/$METHOD-$SEED

once() { # NAME COMMAND ...: run a command that makes files, once
    [ -e "$1.done" ] || { "${@:2}" && mkdir -p "$(dirname "$1")" && touch "$1.done"; }
}
data() { # STEP ...: of data.py
    "$PYTHON" "$HERE/data.py" "$@" --out "$OUT"
}
answers() { # FOLDER MODEL PROMPTS TOKENS: greedy answers
    "$BFPO" generate --model "$2" --prompts "$3" --out "$1" --set "max_new_tokens=$4" --set temperature=0 \
        --set dtype=auto --set batch_size=64 --set "threads=$THREADS" --resume
}
# A CPU without instructions for bfloat16 emulates it: a step then takes many times as long as in float32.
DTYPE=${DTYPE:-$("$PYTHON" -c 'from bfpo.policy.precision import decoding_dtype; print(decoding_dtype("auto")[0])')}
PROBE=(--set "probe.harmful=[$OUT/prompts/dev_harmful.jsonl]" --set "probe.harmless=[$OUT/prompts/dev_harmless.jsonl]")
sft() { # FOLDER MODEL ROWS, further settings
    "$BFPO" sft --config "$HERE/sft.yaml" --set "model=$2" --set "data.files=[$3]" "${PROBE[@]}" --set "seed=$SEED" \
        --set "dtype=$DTYPE" --set "threads=$THREADS" --out "$1" --resume "${@:4}"
}
train() { # ROUND MODEL
    # An anchor weighs about four times as much beside a logistic loss as beside BFPO's.
    local own=() logistic=(--set link=null --set safety_weight=null --set anchor_weight=0.075)
    case $METHOD in
    bfpo) ;;
    bfpo_squared) own=(--set link=squared) ;;
    # The best of four trials each (docs/real-model.md).
    dpo_safe_first) own=(--set method=dpo_safe_first "${logistic[@]}" --set buffer_weight=3) ;;
    safedpo) own=(--set method=safedpo "${logistic[@]}" --set safedpo_delta=2 --set buffer_weight=4) ;;
    esac
    "$BFPO" train --config "$HERE/train.yaml" --set "model=$2" --set "data.files=[$ARM/main-$1.jsonl]" \
        --set "buffer.files=[$ARM/buffer-$1.jsonl]" --set "reference_cache=$OUT/cache" "${PROBE[@]}" --set "seed=$SEED" \
        --set "dtype=$DTYPE" --set "threads=$THREADS" ${own[@]+"${own[@]}"} --out "$ARM/round-$1" --resume
}

mkdir -p "$OUT"
# What the prompts and pairs are made of: RECIPE is the checksum of the files that make them.
from="MODEL=$MODEL DATA=$DATA"
made="$from RECIPE=$(cd "$HERE" && cat data.py contrast.txt harmful.txt wording.json | cksum | tr ' ' -)"
earlier=$(cat "$OUT/.made-from" 2>/dev/null || echo "$made")
if [ "$earlier" = "$from" ]; then
    echo "$OUT goes on with the prompts that it has; it does not say which version of the recipe made them"
elif [ "$earlier" != "$made" ]; then
    echo "error: $OUT was made from $earlier, now $made; set OUT (REAL_OUT of make) to another folder" >&2
    exit 2
fi
once "$OUT/.prompts" data prompts ${DATA:+--data "$DATA"}
[ -e "$OUT/.made-from" ] || echo "$made" >"$OUT/.made-from"
answers "$OUT/start-harmless" "$MODEL" "$OUT/prompts/train_harmless.jsonl" 48
answers "$OUT/start-harmful" "$MODEL" "$OUT/prompts/pairs_harmful.jsonl" 32
once "$OUT/.rows" data rows
sft "$SFT" "$MODEL" "$OUT/sft.jsonl"
if [ "$METHOD" = sft-more ]; then
    sft "$ARM" "$SFT/model" "$OUT/sft-more.jsonl" --set max_steps=200 --set learning_rate=1.0e-4
    models=("$ARM")
else
    last=$SFT
    for round in 1 2; do # on what the last model refuses needlessly and on what it still answers
        from=$ARM
        [ $round = 2 ] || from=$OUT/first-$SEED # what SFT gets wrong: the same for all methods
        answers "$from/ask-$round-harmless" "$last/model" "$OUT/prompts/ask-${round}_harmless.jsonl" 24
        answers "$from/ask-$round-harmful" "$last/model" "$OUT/prompts/pairs_harmful.jsonl" 24
        once "$from/.refused-$round" data refused --round "$round" --arm "$from"
        answers "$from/start-more-$round" "$MODEL" "$from/prompts/more-${round}_harmless.jsonl" 48
        once "$from/.pairs-$round" data pairs --round "$round" --arm "$from"
        mkdir -p "$ARM"
        [ $round = 2 ] || once "$ARM/.first" cp -r "$from/." "$ARM"
        train "$round" "$last/model"
        last=$ARM/round-$round
    done
    models=("$ARM"/round-[12])
fi
[ -z "${NO_SCORES:-}" ] || exit 0 # arms.sh scores all of them together
export MODEL OUT BFPO THREADS LABELS=${LABELS:-} GATE=1
"$HERE/score.sh" "$OUT/evaluate-$METHOD-$SEED" "$OUT/report.html" "SmolLM2-135M-Instruct, SFT and BFPO" "$SFT" "${models[@]}"
