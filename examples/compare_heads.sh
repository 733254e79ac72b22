#!/usr/bin/env bash
# Heads of every objective on the same data and for as many steps, and what each one gains.
#
#   examples/compare_heads.sh TARGET DATA OUT        (needs a GPU; DATA of `vllm-eagle3 data synth`)
#
# Into OUT: a folder for each head, its `vllm-eagle3 eval` beside it, and heads.md with heads.png,
# the table and tau over training tokens. What is there already is not made again; what fails
# names its log and ends the script. Settings:
#   STEPS=2000       optimiser steps with all of the data; with a share of it as many less
#   SHARES="8 4 2"   heads of an eighth, a quarter and half of the data, too; "" for none
#   SCALED="eagle3 eagle1"   the objectives whose heads these are
#   LIMIT=80         questions of each set;  MAX_TOKENS=256  of an answer
#   JOBS=4           trainings, then evaluations, at once; each has one of the visible GPUs, in turn
set -euo pipefail
target=$1 data=$2 out=$3
: "${STEPS:=2000}" "${SHARES=8 4 2}" "${SCALED:=eagle3 eagle1}" "${LIMIT:=80}" "${MAX_TOKENS:=256}" "${JOBS:=4}"
mkdir -p "$out"
if [ -n "${CUDA_VISIBLE_DEVICES-}" ]; then
  gpus=${CUDA_VISIBLE_DEVICES//,/ }
else
  gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null) || gpus=
fi

shares() { # lines of NAME OBJECTIVE N: heads to be trained with one of every N documents
  local n objective
  for n in $SHARES; do
    for objective in $SCALED; do
      echo "$objective-1of$n $objective $n"
    done
  done
}

train() { # NAME OBJECTIVE N: with one of every N documents
  local share
  share=$(awk -v n="$3" 'BEGIN { print 1 / n }')
  [ -f "$out/$1/model.safetensors" ] ||
    vllm-eagle3 train --target "$target" --data "$data" --data-share "$share" --out "$out/$1" \
      --objective "$2" --epochs 100000 --steps $((STEPS / $3)) \
      > "$out/$1.train.log" 2>&1 ||
    { echo "training $1 failed: $out/$1.train.log" >&2; return 1; }
}

evaluate() { # NAME HEAD TREE: into a folder of its own, as a failed one writes its results, too
  [ ! -f "$out/$1.json" ] || return 0
  rm -rf "$out/$1.partial" && mkdir "$out/$1.partial" || return
  vllm-eagle3 eval --target "$target" --head "$out/$2" --chain --tree "$3" --temperature 0 1 \
    --limit "$LIMIT" --max-tokens "$MAX_TOKENS" --no-prediction --enforce-eager --jobs "$JOBS" \
    --output "$out/$1.partial/$1.json" > "$out/$1.eval.log" 2>&1 ||
    { echo "evaluating $1 failed: $out/$1.eval.log" >&2; return 1; }
  mv "$out/$1.partial"/* "$out/" && rmdir "$out/$1.partial"
}

at_once() { # runs the lines of its input, JOBS of them together; starts none after a failure
  xargs -r -P "$JOBS" -L 1 --process-slot-var=slot bash -c 'set -uo pipefail
    each=($gpus)
    [ ${#each[@]} = 0 ] || export CUDA_VISIBLE_DEVICES=${each[slot % ${#each[@]}]}
    "$@" || exit 255' at_once
}

export -f train evaluate
export gpus target data out STEPS LIMIT MAX_TOKENS JOBS

{
  for objective in eagle1 hass eagle3-top eagle3 eagle3.1; do
    echo "train $objective $objective 1"
  done
  shares | sed 's/^/train /'
} | at_once

{
  echo "evaluate eagle1-static eagle1 mc_sim_7b_63"
  for name in eagle1 hass eagle3-top eagle3 eagle3.1; do
    echo "evaluate $name $name 63"
  done
  shares | while read -r name _; do
    echo "evaluate $name $name 63"
  done
} | at_once

results=(
  "EAGLE-1, static tree=$out/eagle1-static.json"
  "EAGLE-2=$out/eagle1.json"
  "HASS=$out/hass.json"
  "EAGLE-3 without fusion=$out/eagle3-top.json"
  "EAGLE-3=$out/eagle3.json"
  "EAGLE-3.1=$out/eagle3.1.json"
)
while read -r name _; do
  results+=("$out/$name.json")
done < <(shares)
vllm-eagle3 bench heads "${results[@]}" --output "$out/heads.json"
