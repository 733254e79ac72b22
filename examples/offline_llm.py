"""Offline generation with a draft tree.

python offline_llm.py TARGET HEAD          (a chat model, and an EAGLE-3 head for it)
"""

import sys

import torch

ON_CPU = not torch.cuda.is_available()  # to try it, not for speed
if ON_CPU:  # before vllm is imported
    from vllm_eagle3.engine import interpreter

    interpreter.prepare()

from vllm import LLM, SamplingParams  # noqa: E402

QUESTIONS = ["What is the capital of France?", "Write a haiku about the sea."]


def main() -> None:
    target, head = sys.argv[1:]
    llm = LLM(
        model=target,
        max_model_len=2048,
        max_num_seqs=8,
        gpu_memory_utilization=0.5,  # of the memory, without a GPU too
        enforce_eager=ON_CPU,
        disable_log_stats=False,  # for get_metrics below
        speculative_config={
            "method": "eagle3",
            "model": head,
            "num_speculative_tokens": 63,
            "tree": {"depth": 5, "top_k": 16},  # without this line: vLLM's chain
        },
    )
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    sampling = SamplingParams(temperature=0.0, max_tokens=48)
    for question, output in zip(QUESTIONS, llm.chat(chats, sampling), strict=True):
        print(f"{question}\n{output.outputs[0].text}\n")

    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts = counters["vllm:spec_decode_num_drafts"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    print(f"{1 + accepted / drafts:.2f} tokens for each forward of the target")


if __name__ == "__main__":
    main()
