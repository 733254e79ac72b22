#!/usr/bin/env bash
# Heads of every objective on the same data and for as many steps, and what each one gains.
#
#   examples/compare_heads.sh TARGET DATA OUT        (needs a GPU; DATA of `vllm-eagle3 data synth`)
#
# Into OUT: a folder for each head, its `vllm-eagle3 eval` beside it, and heads.md with heads.png,
# the table and tau over training tokens. What is there already is not made again. Settings:
#   STEPS=2000       optimiser steps with all of the data; with a share of it as many less
#   SHARES="8 4 2"   EAGLE-3 heads of an eighth, a quarter and half of the data
#   LIMIT=80         questions of each set;  MAX_TOKENS=256  of an answer
#   DRAFT_VOCABULARY=8192
#   JOBS=4           trainings, then evaluations, that share the GPU
set -euo pipefail
target=$1 data=$2 out=$3
: "${STEPS:=2000}" "${SHARES=8 4 2}" "${LIMIT:=80}" "${MAX_TOKENS:=256}" "${JOBS:=4}" "${DRAFT_VOCABULARY:=8192}"
mkdir -p "$out"

train() { # NAME OBJECTIVE DATA STEPS
  [ -f "$out/$1/model.safetensors" ] ||
    vllm-eagle3 train --target "$target" --data "$3" --out "$out/$1" --objective "$2" \
      --draft-vocab-size "$DRAFT_VOCABULARY" --epochs 100000 --steps "$4" > "$out/$1.train.log" 2>&1
}

evaluate() { # NAME HEAD TREE
  [ -f "$out/$1.json" ] ||
    vllm-eagle3 eval --target "$target" --head "$out/$2" --chain --tree "$3" --temperature 0 1 \
      --limit "$LIMIT" --max-tokens "$MAX_TOKENS" --no-prediction --enforce-eager --jobs "$JOBS" \
      --output "$out/$1.json" > "$out/$1.eval.log" 2>&1
}

at_once() { # runs the lines of its input, JOBS of them together; ends at the first failure
  while read -r line; do
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done
    $line &
  done
  while [ -n "$(jobs -rp)" ]; do wait -n; done
}

share() { # N: the first of every N shards
  local folder=$out/data-$1
  mkdir -p "$folder"
  realpath "$data"/shard-*.safetensors | awk -v n="$1" 'NR % n == 1' |
    xargs -I{} ln -sf {} "$folder/"
  echo "$folder"
}

{
  for objective in eagle1 hass eagle3-top eagle3 eagle3.1; do
    echo "train $objective $objective $data $STEPS"
  done
  for n in $SHARES; do
    echo "train eagle3-1of$n eagle3 $(share "$n") $((STEPS / n))"
  done
} | at_once

{
  echo "evaluate eagle1-static eagle1 mc_sim_7b_63"
  for name in eagle1 hass eagle3-top eagle3 eagle3.1 $(printf 'eagle3-1of%s ' $SHARES); do
    echo "evaluate $name $name 63"
  done
} | at_once

vllm-eagle3 bench heads "EAGLE-1, static tree=$out/eagle1-static.json" "EAGLE-2=$out/eagle1.json" \
  "HASS=$out/hass.json" "EAGLE-3 without fusion=$out/eagle3-top.json" "EAGLE-3=$out/eagle3.json" \
  "EAGLE-3.1=$out/eagle3.1.json" $(printf "$out/eagle3-1of%s.json " $SHARES) --output "$out/heads.json"
