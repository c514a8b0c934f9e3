#!/usr/bin/env bash
# The table of docs/results.md for several seeds, and ZeRO-2 and ZeRO-3 on two GPUs beside the first seed's losses.
#
#   benchmarks/smollm2_seeds.sh COLLECTION OUT [SEEDS...]      # one H100: about 5 minutes a seed
#   ZERO=1 benchmarks/smollm2_seeds.sh COLLECTION OUT 0        # two GPUs: also the first 25 steps under zero2 and zero3
#
# Leaves OUT/seed<N>/stages/evaluate/result/results.json and OUT/zero{2,3}/events.jsonl (compare `losses` step by step).
set -euo pipefail
collection=$1 out=$2
shift 2
recipe="launch/recipes/smollm2_collection.yaml"
for seed in "${@:-0}"; do
  deepspeed --num_gpus 1 launch/train.py --config $recipe --data.collection "$collection" \
    --output "$out/seed$seed" --seed "$seed"
done
[ "${ZERO:-0}" = 1 ] || exit 0
for strategy in zero2 zero3; do
  run="$out/$strategy"
  deepspeed --num_gpus 2 launch/train.py --config $recipe --data.collection "$collection" --output "$run" \
    --seed "${1:-0}" --strategy $strategy --stages '[experts]' --tracking.enabled false &
  job=$!
  while kill -0 $job 2>/dev/null && [ "$(grep -c '"kind":"step"' "$run/events.jsonl" 2>/dev/null || true)" -lt 25 ] 2>/dev/null; do
    sleep 1
  done
  quietgoose stop --now "$run" || true
  wait $job || true
done
