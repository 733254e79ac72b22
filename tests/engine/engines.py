"""Engines in this process, and what a test reads from them."""

import contextlib
import gc
import random
from collections.abc import Iterator, Sequence
from typing import Any

from tests.engine.tiny import Pair

Tokens = tuple[int, ...]

BLOCK_SIZE = 32


class Engine:
    """vLLM's offline engine on token ids."""

    def __init__(self, pair: Pair, **settings: Any) -> None:
        from vllm import LLM

        defaults = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 320,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 1024,
            "block_size": BLOCK_SIZE,
            "kv_cache_memory_bytes": 1 << 27,
            "disable_log_stats": False,
        }
        self.llm = LLM(str(pair.target), **{**defaults, **settings})

    @property
    def runner(self) -> Any:
        """vLLM's model runner."""
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        return executor.driver_worker.worker.model_runner

    def generate(self, prompts: Sequence[Tokens], params: Any) -> list[Tokens]:
        """Output tokens for each prompt; of all samples one after another where n > 1."""
        return [
            tuple(sample.token_ids)
            for output in self.outputs(prompts, params)
            for sample in output.outputs
        ]

    def outputs(self, prompts: Sequence[Tokens], params: Any) -> list[Any]:
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(requests, params, use_tqdm=False)

    def metric(self, name: str) -> int:
        """A counter of vLLM's metrics since the engine started."""
        values = [m.value for m in self.llm.get_metrics() if m.name == f"vllm:{name}"]
        assert values, f"no metric vllm:{name}"
        return int(sum(values))

    def shutdown(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


@contextlib.contextmanager
def running(pair: Pair, **settings: Any) -> Iterator[Engine]:
    """An engine for the duration of the context."""
    engine = Engine(pair, **settings)
    try:
        yield engine
    finally:
        engine.shutdown()
        gc.collect()


def chain(pair: Pair, num_drafts: int, **extra: Any) -> dict[str, Any]:
    """The speculative config of vLLM's own chain."""
    return {
        "method": "eagle3",
        "model": str(pair.head),
        "num_speculative_tokens": num_drafts,
        **extra,
    }


def tree(pair: Pair, num_drafts: int, depth: int, top_k: int, **extra: Any) -> dict[str, Any]:
    """The speculative config of a tree."""
    return {**chain(pair, num_drafts, **extra), "tree": {"depth": depth, "top_k": top_k}}


def sampling(max_tokens: int, **settings: Any) -> Any:
    """Sampling parameters; greedy and never stopping early unless told otherwise."""
    from vllm import SamplingParams

    defaults = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    return SamplingParams(max_tokens=max_tokens, **{**defaults, **settings})


def random_prompts(
    count: int, seed: int, shortest: int = 3, longest: int = 70, vocab_size: int = 512
) -> list[Tokens]:
    rng = random.Random(seed)
    return [
        tuple(rng.randrange(3, vocab_size) for _ in range(rng.randint(shortest, longest)))
        for _ in range(count)
    ]
