#!/usr/bin/env bash
# What wants a GPU, part by part; a part that fails or outlasts its limit does not stop the others. For figures that count,
# have the card and the host to yourself.
#
#   benchmarks/on_gpu.sh OUT tests routed training cache thoughts images     # one card; parts in this order
#   benchmarks/on_gpu.sh OUT scaling                                         # two cards or more
#   CUDA_VISIBLE_DEVICES=1 MODEL=FOLDER_OR_GGUF TEXT=FOLDER CIFAR=FOLDER COLLECTION=FOLDER benchmarks/on_gpu.sh OUT quality seeds
#
# MODEL  base of quality, thoughts and seeds (default smollm2)   TEXT   text for the cache's quality (a file or a folder)
# CIFAR  train.parquet and test.parquet                          COLLECTION  the tasks of smollm2_collection
# OUT gets a JSON and a log a part, and `summary`: seconds, exit status, command. Minutes on an H100 stand beside each part.
set -u
out=$1
shift
mkdir -p "$out"
model=${MODEL:-smollm2}

run() {  # run NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  timeout -k 20 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  echo "$(date +%T) $((SECONDS - begin)) s, status $status: $name: $*" | tee -a "$out/summary"
  [ $status -eq 0 ] || tail -n 3 "$out/$name.log"
}
bench() {  # bench NAME SECONDS SCRIPT ARGUMENTS...
  local name=$1 limit=$2 script=$3
  shift 3
  run "$name" "$limit" python "benchmarks/$script.py" "$@" --out "$out/$name.json"
}
stage() {  # stage NAME SECONDS RECIPE SETTINGS...
  local name=$1 limit=$2 recipe=$3
  shift 3
  run "$name" "$limit" python launch/train.py --config "launch/recipes/$recipe.yaml" --output "$out/$name" "$@"
}

tests() {  # 7 minutes
  run tests_kernels 300 python -m pytest -q -n 6 --timeout 300 -m gpu tests/kernels tests/routing
  run tests_cache 240 python -m pytest -q -n 6 --timeout 300 -m gpu tests/cache
  run tests_rest 420 python -m pytest -q -n 6 --timeout 300 -m gpu tests/thoughts tests/alignment tests/train
}
routed() {  # 22 minutes
  run routed_tests 300 python -m pytest -q -n 4 -rf -m gpu tests/kernels/test_routed_lora*.py tests/routing
  bench routed_models 240 routed_lora --parts models decode --shapes smollm2 --experts 16 --model-experts 16 166 --no-peft --budget-seconds 220
  bench routed_wide 150 routed_lora --parts models --shapes llama3-8b --layers 16 --model-experts 16 --batches 8x512 1x1 --no-peft --budget-seconds 130
  bench routed_wide_arms 120 routed_lora_wide --batches 8x512 1x512 --rounds 2
  bench routed_layer 245 routed_lora --parts layer --shapes smollm2 --ours table --tokens 1 32 512 4096 --budget-seconds 225
  bench routed_layer_wide 245 routed_lora --parts layer --shapes llama3-8b --ours table --tokens 1 32 512 4096 --budget-seconds 225
  bench routed_sixty_four 120 routed_lora --parts tune_many --tune-many formulations --experts 64 --tune-tokens 32 128 256 512 4096 32768 --budget-seconds 100
  bench routed_many 150 routed_lora --parts tune_many models profile --shapes smollm2 --experts 166 --model-experts 166 --tune-tokens 4096 --no-peft --budget-seconds 140
  bench routed_training 200 routed_lora_training --budget-seconds 170
}
training() {  # 9 minutes
  bench training_ours 400 training --arms gate ours gates peft --modes graph --budget-seconds 360
  bench training_llama3 180 training --arms llama3 profile --budget-seconds 150
}
scaling() {  # 5 minutes; two cards. overlap_comm waits for the device at every bucket: timed beside the strategy that goes without
  echo '{"zero_optimization": {"stage": 2, "overlap_comm": true, "round_robin_gradients": true}}' > "$out/overlap.json"
  bench scaling 320 scaling --gpus 1 2 --arms data:zero2 "data:$out/overlap.json" expert:zero0 data:zero1 data:zero3 --seconds 3 --budget-seconds 280
}
cache() {  # 16 minutes
  bench cache_prefill 200 kv_cache --prefill
  bench cache_quality 150 kv_cache --prefill --cells 1x512 8x4096 --peers dynamic zip_captured:quality
  bench cache_attention 120 cached_attention
  bench cache_steps 200 kv_cache --cells 8x4096 1x4096 1x512 8x512 --stream --peers static_captured zip_captured:paper
  bench cache_peers 400 kv_cache --cells 1x512 8x512 1x32768 8x32768 8x4096 --stream --prefill-tokens 5000 --decode-seconds 1 --budget-seconds 45 \
    --peers static_captured zip_captured:paper fp8 kivi4 mikv h2o hqq4 static_compiled quanto4
}
quality() {  # 5 minutes; TEXT
  run quality 330 python benchmarks/kv_quality.py --model "$model" --text "${TEXT:?a text file or folder}" --stages text retrieval \
    --methods "zip quality" "layers 7 18" "layers 18 23" "s16 r128 queries" --budget-seconds 300 --out "$out/quality"
}
thoughts() {  # 14 minutes, and 4 to 6 a seed of `permutations`
  bench thought_attention 150 thought_attention
  run thoughts_tests 300 python -m pytest -q -n 4 -rf -m gpu tests/thoughts tests/train/test_captured_thoughts.py tests/train/test_thought_memory.py
  bench thoughts_bits 150 thoughts_memory --cells 512:9:2 --rows 1 --arms captured int8 int4 --branch-tokens 2048 --budget-seconds 140
  bench thoughts_memory 420 thoughts_memory --cells 512:9:2 1024:13:4 --rows 1 4 16 --arms loop captured recomputed --branch-tokens 2048 8192 32768 --budget-seconds 400
}
permutations() {  # experiment A's last arms, 4 to 6 minutes each; SEED
  local seed=${SEED:-0} arms=(--evaluate.thoughts.arms '[base,no_thought,untrained,thought]' --tracking.enabled false --seed "${SEED:-0}")
  stage "unworked$seed" 600 thoughts_permutations "${arms[@]}" --data.base.path "steps:permutations-direct,k=8,questions=6,filler=2,rows=200000"
  for layers in 2 12; do stage "depth$layers-$seed" 900 thoughts_permutations "${arms[@]}" --base.nano.layers $layers; done
}
images() {  # 11 minutes; CIFAR
  bench images_throughput 320 urepa_throughput --budget-seconds 300
  bench images 330 images --source "${CIFAR:?a folder with train.parquet and test.parquet}/train.parquet" --test "$CIFAR/test.parquet" --budget-seconds 300
}
seeds() {  # 5 minutes a seed; COLLECTION
  for seed in 0 1 2; do
    stage "collection$seed" 600 smollm2_collection --base.model "$model" --data.collection "${COLLECTION:?a folder of tasks}" --seed "$seed"
    stage "words$seed" 1100 thoughts_smollm2 --base.model "$model" --seed "$seed" --evaluate.thoughts.limit 250
  done
}

for part in "$@"; do
  case $part in
    tests|routed|training|scaling|cache|quality|thoughts|permutations|images|seeds) "$part" ;;
    *) echo "no part $part; parts: tests routed training scaling cache quality thoughts permutations images seeds" >&2; exit 2 ;;
  esac
done
