"""Token identity on the shipped pair: SmolLM2-135M-Instruct and the head trained for it.

The test is short; the full comparison is a command:

    python -m tests.engine.test_smollm2 --prompts 20 --tokens 200
"""

import argparse
import tempfile
import time
from pathlib import Path

import pytest

from tests.engine.engines import Engines, sampling
from tests.engine.tiny import Pair
from vllm_eagle3.demo import smollm2

HEAD = Path(smollm2.__file__).parent / "head"
SHAPE = {"num_drafts": 15, "depth": 5, "top_k": 4}
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "How many legs do three spiders have?",
    "Explain photosynthesis to a child.",
    "Write a Python function that reverses a string.",
    "Name three primary colours.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "What is 17 times 23?",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "What does an engineer do?",
    "Tell me a joke about computers.",
    "Summarise the water cycle in two sentences.",
    "What is the difference between a list and a tuple?",
    "Plan a day in Rome.",
    "Is the number 91 prime?",
    "Write a short letter of thanks.",
    "How do vaccines work?",
    "Describe a sunset in the mountains.",
]


def compare(pair: Pair, num_prompts: int, num_tokens: int) -> tuple[int, int, float]:
    """Prompts with identical answers, tokens of all answers, and tokens for each forward."""
    engines = Engines(pair)
    settings = {
        "skip_tokenizer_init": False,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 1 << 29,
    }
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS[:num_prompts]]
    plain = engines.get(**settings).llm.chat(chats, sampling(num_tokens), use_tqdm=False)
    engine = engines.tree(**SHAPE, **settings)
    drafted = engine.llm.chat(chats, sampling(num_tokens), use_tqdm=False)
    identical = sum(
        list(one.outputs[0].token_ids) == list(other.outputs[0].token_ids)
        for one, other in zip(plain, drafted, strict=True)
    )
    accepted = engine.metric("spec_decode_num_accepted_tokens")
    forwards = engine.metric("spec_decode_num_drafts")
    return identical, num_prompts * num_tokens, 1 + accepted / forwards


@pytest.mark.slow
def test_the_shipped_pair(tmp_path: Path):
    target = smollm2.convert(tmp_path / "target", dtype="float32")
    identical, _, tau = compare(Pair(target, HEAD), num_prompts=4, num_tokens=48)
    assert identical == 4
    assert tau > 1.5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.engine.test_smollm2")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--head", type=Path, default=HEAD)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = smollm2.convert(Path(folder), dtype="float32")
        start = time.monotonic()
        identical, tokens, tau = compare(Pair(target, args.head), args.prompts, args.tokens)
        seconds = time.monotonic() - start
    print(
        f"{identical} of {args.prompts} answers identical ({tokens} tokens),"
        f" {tau:.2f} tokens for each forward, {seconds:.0f} s"
    )
    if identical != args.prompts:
        raise SystemExit(1)


if __name__ == "__main__":
    from vllm_eagle3.engine import interpreter

    interpreter.prepare()
    main()
