"""Engines in this process, and what a test reads from them."""

import random
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from tests.engine.tiny import Pair

Tokens = tuple[int, ...]

BLOCK_SIZE = 32


_STARTED: list["Engine"] = []


def close_all() -> None:
    """End every engine of the process; there can be none afterwards.

    Not one by one, because vLLM's process groups are shared by all of them, and without the
    garbage collections that vLLM makes for each, which would take minutes.
    """
    with mock.patch("gc.collect"):
        for engine in _STARTED:
            engine.llm.llm_engine.engine_core.shutdown()
    _STARTED.clear()


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
        _STARTED.append(self)

    @property
    def core(self) -> Any:
        """vLLM's engine core: scheduler and executor."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def runner(self) -> Any:
        """vLLM's model runner."""
        return self.core.model_executor.driver_worker.worker.model_runner

    def generate(self, prompts: Sequence[Tokens], params: Any) -> list[Tokens]:
        """Output tokens for each prompt; of all samples one after another where n > 1."""
        return [
            tuple(sample.token_ids)
            for output in self.outputs(prompts, params)
            for sample in output.outputs
        ]

    def outputs(self, prompts: Sequence[Tokens], params: Any) -> list[Any]:
        """vLLM's request outputs, in the order of the prompts."""
        return self.llm.generate([_request(prompt) for prompt in prompts], params, use_tqdm=False)

    def metric(self, name: str) -> int:
        """A counter of vLLM's metrics, which belong to the engine that was started last."""
        values = [m.value for m in self.llm.get_metrics() if m.name == f"vllm:{name}"]
        assert values, f"no metric vllm:{name}"
        return int(sum(values))

    def serve(
        self,
        arrivals: Sequence[tuple[int, Tokens, Any]],
        between_steps: Callable[[int, dict[int, Tokens]], None] | None = None,
    ) -> list[Tokens]:
        """Output tokens of requests that arrive while others run.

        Args:
            arrivals: the step before which a request arrives, its prompt and its parameters.
            between_steps: called after each step with its number and the outputs so far.
        """
        engine, outputs, step = self.llm.llm_engine, dict[int, Tokens](), 0
        waiting = sorted(enumerate(arrivals), key=lambda arrival: arrival[1][0])
        while waiting or engine.has_unfinished_requests():
            while waiting and waiting[0][1][0] <= step:
                index, (_, prompt, params) = waiting.pop(0)
                outputs[index] = ()
                engine.add_request(str(index), _request(prompt), params)
            for output in engine.step():
                outputs[int(output.request_id)] = tuple(output.outputs[0].token_ids)
            if between_steps is not None:
                between_steps(step, outputs)
            step += 1
        return [outputs[index] for index in range(len(arrivals))]


def _request(prompt: Tokens) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(prompt)}


class Engines:
    """The engines of a test session, one for each configuration.

    They are kept, which is cheap; starting one takes seconds.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self._engines: dict[str, Engine] = {}

    def get(self, **settings: Any) -> Engine:
        """An idle engine with an empty prefix cache."""
        key = repr(sorted(settings.items()))
        engine = self._engines.get(key)
        # A test that failed halfway leaves requests behind.
        if engine is None or engine.llm.llm_engine.has_unfinished_requests():
            engine = self._engines[key] = Engine(self.pair, **settings)
        assert engine.llm.reset_prefix_cache()
        return engine

    def tree(
        self,
        num_drafts: int,
        depth: int,
        top_k: int,
        speculative: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Engine:
        """An engine that drafts trees."""
        config = tree(self.pair, num_drafts, depth, top_k, **(speculative or {}))
        return self.get(speculative_config=config, **settings)


def chain(pair: Pair, num_drafts: int, **extra: Any) -> dict[str, Any]:
    """The speculative config of vLLM's own chain."""
    return {
        "method": "eagle3",
        "model": str(pair.head),
        "num_speculative_tokens": num_drafts,
        **extra,
    }


def tree(pair: Pair, num_drafts: int, depth: int, top_k: int, **extra: Any) -> dict[str, Any]:
    """The speculative config of a tree of one size in every batch."""
    shape = {"depth": depth, "top_k": top_k, "verify_budget": None}
    return {**chain(pair, num_drafts, **extra), "tree": shape}


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
