#!/usr/bin/env bash
# An OpenAI-compatible server with draft trees; openai_client.py talks to it.
#
#   serve.sh TARGET HEAD [options of vllm serve]
#
# METHOD=eagle for an EAGLE-1 head; `vllm-eagle3 inspect HEAD` names the method.
# To try it without a GPU, put `python -m vllm_eagle3.engine.interpreter` in place of `vllm`
# and add `--enforce-eager --dtype float32 --max-model-len 2048 --gpu-memory-utilization 0.5`.
set -euo pipefail
target=$1 head=$2
exec vllm serve "$target" --served-model-name target --speculative-config "{
  \"method\": \"${METHOD:-eagle3}\",
  \"model\": \"$head\",
  \"num_speculative_tokens\": 63,
  \"tree\": {\"depth\": 5, \"top_k\": 16}
}" "${@:3}"
