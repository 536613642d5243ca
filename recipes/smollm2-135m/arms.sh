#!/usr/bin/env bash
# The arms of docs/real-model.md: rivals of BFPO and further seeds, each by the stages of run.sh, and all of them scored together.
# The variables are those of run.sh. ARMS: the arms as METHOD-SEED.
# After the first arm others can run beside it: METHOD=... SEED=... NO_SCORES=1 run.sh.
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
export MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct} OUT=${OUT:-runs/real} BFPO=${BFPO:-bfpo}
export THREADS=${THREADS:-2} NO_SCORES=1
ARMS=${ARMS:-bfpo-0 bfpo_squared-0 dpo_safe_first-0 safedpo-0 sft-more-0 bfpo-1 dpo_safe_first-1 bfpo-2 dpo_safe_first-2}

runs=()
for arm in $ARMS; do
    METHOD=${arm%-*} SEED=${arm##*-} "$HERE/run.sh"
    rounds=("$OUT/$arm"/round-[12])
    [ "${arm##*-}" = 0 ] || rounds=("$OUT/$arm/round-2") # the way there is shown for one seed
    for run in "$OUT/sft-${arm##*-}" "$OUT/$arm" "${rounds[@]}"; do
        [ -d "$run/model" ] && [[ " ${runs[*]-} " != *" $run "* ]] || continue
        runs+=("$run")
    done
done
"$HERE/score.sh" "$OUT/evaluate-arms" "$OUT/arms.html" "SmolLM2-135M-Instruct: arms and seeds" "${runs[@]}"
