"""Greedy decoding with trees emits the tokens of plain vLLM, whatever the trees are.

Each test first makes sure that the case it is about really came up.
"""

from typing import Any

import pytest
import torch

from tests.engine.engines import BLOCK_SIZE, Engine, Tokens, random_prompts, sampling
from tests.engine.oracle import Oracle
from vllm_eagle3 import ops
from vllm_eagle3.tree import mask

NUM_DRAFTS = 10
SHAPE = {"num_drafts": NUM_DRAFTS, "depth": 3, "top_k": 3}
PROMPTS = random_prompts(20, seed=7)
NUM_TOKENS = 200
FEW, SHORT = 6, 48


@pytest.fixture(scope="module")
def texts(plain: Engine) -> list[Tokens]:
    """What plain vLLM emits after each prompt."""
    return plain.generate(PROMPTS, sampling(NUM_TOKENS))


@pytest.fixture
def consult(monkeypatch: pytest.MonkeyPatch, texts: list[Tokens]) -> Any:
    """Gives an engine an oracle that knows the texts."""

    def attach(engine: Engine, **settings: Any) -> Oracle:
        oracle = Oracle(engine, monkeypatch, **settings)
        oracle.know(PROMPTS, texts)
        return oracle

    return attach


def short(texts: list[Tokens], count: int = FEW, length: int = SHORT) -> list[Tokens]:
    return [text[:length] for text in texts[:count]]


def test_random_trees(engines, consult, texts):
    engine = engines.tree(**SHAPE)
    oracle = consult(engine)
    assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    assert oracle.count["accepted"] > 2000
    assert oracle.count["moved"] > 500


def continue_texts(engine: Engine, texts: list[Tokens]) -> tuple[list[Tokens], int]:
    """Continue each text behind blocks that the engine itself has cached while decoding it.

    Returns the outputs, and how many of the blocks that are read hold decoded tokens only.
    """
    half = 100
    prompts = [p + t[:half] for p, t in zip(PROMPTS, texts, strict=False)]
    outputs = engine.outputs(prompts, sampling(30))
    blocks = sum(
        (output.num_cached_tokens - len(prompt)) // BLOCK_SIZE
        for output, prompt in zip(outputs, PROMPTS, strict=False)
    )
    return [tuple(output.outputs[0].token_ids) for output in outputs], blocks


def test_prefix_cache_of_compacted_blocks(engines, consult, texts):
    engine = engines.tree(**SHAPE)
    oracle = consult(engine)
    assert engine.generate(PROMPTS[:FEW], sampling(110)) == short(texts, FEW, 110)
    assert oracle.count["moved"] > 80
    continued, blocks = continue_texts(engine, texts[:FEW])
    assert blocks >= FEW
    assert continued == [text[100:130] for text in texts[:FEW]]


def test_without_compaction_the_text_differs(engines, consult, texts, monkeypatch):
    """The control of this file: its trees cannot pass unless caches are moved."""
    engine = engines.tree(**SHAPE)
    consult(engine)
    monkeypatch.setattr(ops, "compact_kv", lambda *args, **kwargs: None)
    outputs = engine.generate(PROMPTS[:FEW], sampling(24))
    wrong = [output != text for output, text in zip(outputs, short(texts, FEW, 24), strict=True)]
    assert sum(wrong) > FEW // 2
    engine.llm.reset_prefix_cache()


def test_with_a_causal_mask_the_text_differs(engines, consult, texts, monkeypatch):
    """Another control: the nodes of a tree must not see their siblings."""
    engine = engines.tree(**SHAPE)
    consult(engine)

    def causal(bits_RN: torch.Tensor, depths_RN: torch.Tensor, *args: Any) -> None:
        chain_N = mask.chain_parents(bits_RN.shape[1], bits_RN.shape[1] - 1, bits_RN.device)
        gather(mask.ancestor_bits(chain_N).repeat(len(bits_RN), 1), depths_RN, *args)

    gather = ops.gather_tree_rows
    monkeypatch.setattr(ops, "gather_tree_rows", causal)
    assert engine.generate(PROMPTS[:4], sampling(16)) != short(texts, 4, 16)
    engine.llm.reset_prefix_cache()


def test_preemption(engines, consult, texts):
    engine = engines.tree(**SHAPE, num_gpu_blocks_override=16)
    oracle = consult(engine, seed=2)
    assert engine.generate(PROMPTS[:9], sampling(80)) == short(texts, 9, 80)
    assert oracle.count["preempted"] >= 3
    assert oracle.count["moved"] > 100


def test_chunked_prefill_and_trimmed_trees(engines, consult, texts):
    """A step's budget holds two trees: chunks of prompts take turns with trimmed trees."""
    engine = engines.tree(**SHAPE, max_num_seqs=6, max_num_batched_tokens=30)
    oracle = consult(engine, seed=3)
    assert engine.generate(PROMPTS[:FEW], sampling(SHORT)) == short(texts)
    assert oracle.count["trimmed"] > 10
    assert oracle.count["mixed"] > 3
    assert oracle.count["moved"] > 30


def test_max_model_len(engines, consult, texts):
    """The last trees of a text are trimmed, to every length."""
    limit = 128
    engine = engines.tree(**SHAPE, max_model_len=limit)
    oracle = consult(engine, seed=4)
    prompts = [p + t[: limit - 30 - len(p)] for p, t in zip(PROMPTS, texts, strict=True)]
    expected = [t[limit - 30 - len(p) :][:30] for p, t in zip(PROMPTS, texts, strict=True)]
    assert engine.generate(prompts, sampling(limit)) == expected
    assert set(oracle.lengths) == set(range(1, NUM_DRAFTS + 1))


def test_async_scheduling(engines, consult, texts, monkeypatch):
    """Scheduled before the last step's counts are known; vLLM turns it off on CPUs."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def keep_async(config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(keep_async))
    for limit in ({}, {"num_gpu_blocks_override": 16}, {"max_num_batched_tokens": 31}):
        engine = engines.tree(**SHAPE, max_model_len=160, max_num_seqs=7, **limit)
        assert type(engine.core.scheduler).__name__ == "AsyncScheduler"
        oracle = consult(engine, seed=5)
        expected = [t[: min(SHORT, 160 - len(p))] for p, t in zip(PROMPTS, texts, strict=True)]
        assert engine.generate(PROMPTS[:8], sampling(SHORT)) == expected[:8]
        assert oracle.count["moved"] > 30
        if "num_gpu_blocks_override" in limit:
            assert oracle.count["preempted"] > 0
        if "max_num_batched_tokens" in limit:
            assert oracle.count["trimmed"] > 0


def test_prompts_arrive_while_others_decode(engines, consult, texts):
    engine = engines.tree(**SHAPE, max_num_batched_tokens=64)
    oracle = consult(engine, seed=6)
    lengths = [SHORT if i % 3 else 1 for i in range(12)]
    arrivals = [
        (2 * i, prompt, sampling(length))
        for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=False))
    ]
    expected = [text[:length] for text, length in zip(texts, lengths, strict=False)]
    assert engine.serve(arrivals) == expected
    assert oracle.count["mixed"] > 5
    assert oracle.count["moved"] > 30


def test_slots_are_used_again(engines, consult, texts):
    """Short requests follow each other in three slots; no tree outlives its request."""
    engine = engines.tree(**SHAPE, max_num_seqs=3)
    oracle = consult(engine, seed=7)
    lengths = [1 + i % 6 for i in range(20)]
    params = [sampling(length) for length in lengths]
    expected = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    assert engine.generate(PROMPTS, params) == expected
    assert oracle.count["accepted"] > 10


def test_placeholder_drafts(engines, plain, consult):
    """vLLM pads a request with one token left to compute; its slot has no tree yet."""
    settings = {"disable_eagle_block_drop": True}
    engine = engines.tree(**SHAPE, speculative=settings)
    prompts = random_prompts(6, 8, shortest=2 * BLOCK_SIZE + 1, longest=2 * BLOCK_SIZE + 1)
    expected = plain.generate(prompts, sampling(24))
    oracle = consult(engine, seed=8)
    oracle.know(prompts, expected)
    assert engine.generate(prompts, sampling(24)) == expected
    assert oracle.count["placeholders"] == 0
    # One by one beside a running request: only then does vLLM pad.
    arrivals = [(i, prompt, sampling(24)) for i, prompt in enumerate(prompts)]
    assert engine.serve(arrivals) == expected
    assert oracle.count["placeholders"] > 0


def test_stop_tokens_inside_a_path(engines, plain, consult, texts):
    """Accepted tokens behind a stop token are dropped."""
    engine = engines.tree(**SHAPE)
    oracle = consult(engine, seed=9)
    stops = [text[17] for text in texts[:FEW]]
    params = [sampling(SHORT, stop_token_ids=[stop]) for stop in stops]
    outputs = engine.generate(PROMPTS[:FEW], params)
    assert outputs == [
        text[: text.index(stop) + 1] for text, stop in zip(texts, stops, strict=False)
    ]
    assert oracle.count["accepted"] > sum(map(len, outputs)) // 2


def test_an_abort_leaves_the_others(engines, consult, texts):
    engine = engines.tree(**SHAPE)
    oracle = consult(engine, seed=10)
    doomed = {1, 3}

    def between_steps(step: int, outputs: dict[int, Tokens]) -> None:
        if step == 4:
            engine.llm.llm_engine.abort_request([str(index) for index in doomed])

    # Requests 6 and 7 arrive after the abort, into the freed slots.
    arrivals = [(0 if i < 6 else 6, PROMPTS[i], sampling(SHORT)) for i in range(8)]
    outputs = engine.serve(arrivals, between_steps)
    for index, output in enumerate(outputs):
        assert output == texts[index][: len(output)]
        assert len(output) < SHORT if index in doomed else len(output) == SHORT
    assert oracle.count["moved"] > 50


def test_dummy_batches_between_steps(engines, consult, texts):
    """Idle data-parallel ranks run them; their slots name live requests."""
    engine = engines.tree(**SHAPE)
    oracle = consult(engine, seed=11)

    def between_steps(step: int, outputs: dict[int, Tokens]) -> None:
        if step:
            rows = 4 * engine.runner.decode_query_len
            engine.runner._dummy_run(rows, uniform_decode=bool(step % 2))

    arrivals = [(0, prompt, sampling(32)) for prompt in PROMPTS[:4]]
    assert engine.serve(arrivals, between_steps) == short(texts, 4, 32)
    assert oracle.count["moved"] > 10


def test_a_tree_for_each_batch_size(engines, plain, monkeypatch):
    """vLLM's schedule of draft counts cuts the tree to its best nodes, the root's best, or none."""
    prompts = PROMPTS[:8]
    texts = plain.generate(prompts, sampling(24))
    schedule = [[1, 2, 12], [3, 4, 1], [5, 6, 0], [7, 8, 5]]
    engine = engines.tree(12, 4, 4, {"num_speculative_tokens_per_batch_size": schedule})
    oracle = Oracle(engine, monkeypatch)
    oracle.know(prompts, texts)
    arrivals = [(2 * i, prompt, sampling(24 - 2 * i)) for i, prompt in enumerate(prompts)]
    assert engine.serve(arrivals) == [text[: 24 - 2 * i] for i, text in enumerate(texts)]
    assert {1, 5, 12} <= set(oracle.lengths)
    assert oracle.count["accepted"] > 20
