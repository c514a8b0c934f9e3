#!/usr/bin/env bash
# The comparison of urepa_compare.yaml on several GPUs of one machine, a run per GPU at a time; start it again to go on where it was cut.
#   benchmarks/urepa_compare.sh TRAIN.parquet TEST.parquet WORK RESULTS [GPUS] [SECONDS] [more settings...]
# GPUS: how many, or which ones with commas (`2,3`, `3,`).
# WORK (local disk, 40 GB): runs, checkpoints, cached features. RESULTS: the tables, scores and events of what is finished, without weights:
# unpacked in a later WORK (with the cache's teachers/ and judges/) it goes on from there.
set -u
train=$1 test=$2 work=$3 results=$4 gpus=${5:-4} seconds=${6:-570}
shift $(( $# < 6 ? $# : 6 ))
recipe=(--config launch/recipes/urepa_compare.yaml --images.source "$train" --images.test "$test"
        --images.cache "$work/cache" --output "$work/run" "$@")
end=$(( $(date +%s) + seconds ))
mkdir -p "$work" "$results"
runs=$(python launch/train.py "${recipe[@]}" --dry_run | sed -n 's/^runs: //p' | tr -d ',')
[ -n "$runs" ] || { echo "no runs: the dry run failed"; exit 1; }
queue=$work/queue
: > "$queue.taken"
one() {  # the next run that nobody has taken, until there is none or no time
  local name
  while [ "$(date +%s)" -lt "$end" ]; do
    name=$(flock "$queue.lock" bash -c 'for r in '"$runs"'; do grep -qx "$r" "$0.taken" || { echo "$r" >> "$0.taken"; echo "$r"; break; }; done' "$queue")
    [ -n "$name" ] || return 0
    [ -f "$work/run/arms/$name/stages/evaluate/DONE.json" ] && { echo "$name was finished before"; continue; }
    CUDA_VISIBLE_DEVICES=$1 timeout -k 30 $(( end - $(date +%s) + 1 )) \
      python launch/train.py "${recipe[@]}" --compare.only "[$name]" > "$work/$name.log" 2>&1
    echo "GPU $1: $name ended with $? at $(date +%T)"
  done
}
case $gpus in *,*) gpus=${gpus//,/ } ;; *) gpus=$(seq 0 $(( gpus - 1 ))) ;; esac
for gpu in $gpus; do one "$gpu" & done
wait
done_=$(find "$work/run/arms" -path '*/stages/evaluate/DONE.json' 2> /dev/null | wc -l)
echo "finished: $done_ of $(echo $runs | wc -w)"
if [ "$done_" -eq "$(echo $runs | wc -w)" ]; then python launch/train.py "${recipe[@]}" 2>&1 | tail -40; fi
(cd "$work" && find run -type f \( -path '*/evaluate/result/*' -o -path '*/compare/result/*' -o -name 'events.jsonl' -o -name 'teacher.json' \
  -o -path '*/evaluate/DONE.json' -o -path '*/compare/DONE.json' -o -name 'unet.json' -o -name 'report.html' \) | tar czf - -T -) > "$results/urepa_compare.tar.gz"
cp "$work"/run/stages/compare/result/compare.* "$results" 2> /dev/null
tail -n 3 "$work"/*.log > "$results/tails.txt" 2>&1
