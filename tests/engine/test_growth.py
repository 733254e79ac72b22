"""The tree that the engine drafts is the one that EAGLE-2 describes.

Accepted lengths, but no output, would show a draft that reads wrong positions or a wrong
cache. Two oracles: vLLM's own chain, which a tree of one child a node must equal draft by
draft, and the head recomputed without any cache.
"""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine import tiny
from tests.engine.engines import Engine, Engines, Tokens, chain, random_prompts, sampling
from tests.engine.naive_head import NaiveHead, assert_drafted
from tests.engine.oracle import Oracle, text_so_far
from vllm_eagle3.train.features import Target, load_target
from vllm_eagle3.train.model import Eagle3Head, HeadConfig

DEPTH = 5
NUM_TOKENS = 24
PROMPTS = random_prompts(8, seed=3)


@pytest.fixture(scope="module")
def texts(plain: Engine) -> list[Tokens]:
    return plain.generate(PROMPTS, sampling(NUM_TOKENS))


def drafts_of_the_chain(engine: Engine, monkeypatch: Any) -> dict[Tokens, Tokens]:
    """vLLM's drafts after each text, filled as the engine runs."""
    drafts: dict[Tokens, Tokens] = {}
    speculator, states = engine.runner.speculator, engine.runner.req_states
    propose = speculator.propose

    def recording(batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = propose(batch, *args, **kwargs)
        if not kwargs.get("dummy_run"):
            for slot, row in zip(batch.idx_mapping_np.tolist(), tokens.tolist(), strict=True):
                drafts[text_so_far(states, slot)] = tuple(row)
        return tokens

    monkeypatch.setattr(speculator, "propose", recording)
    return drafts


@pytest.fixture(scope="module")
def stock_drafts(engines: Engines, pair: tiny.Pair, texts: list[Tokens]) -> dict[Tokens, Tokens]:
    engine = engines.get(speculative_config=chain(pair, DEPTH))
    with pytest.MonkeyPatch.context() as monkeypatch:
        drafts = drafts_of_the_chain(engine, monkeypatch)
        assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    return drafts


def test_one_child_a_node_is_vllms_chain(engines, texts, stock_drafts, monkeypatch):
    engine = engines.tree(DEPTH, depth=DEPTH, top_k=1)
    oracle = Oracle(engine, monkeypatch)
    oracle.know(PROMPTS, texts)
    assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    # Deep accepts, so that the draft also grows from caches that compaction has filled.
    assert oracle.count["accepted"] > 60
    assert oracle.count["moved"] > 15
    compared = 0
    for text, fields in oracle.drafted.items():
        if text in stock_drafts:
            assert tuple(fields["tokens_BN"][1:].tolist()) == stock_drafts[text]
            assert fields["parents_BN"].tolist() == list(range(-1, DEPTH))
            compared += 1
    assert compared > 40


def test_the_best_first_token_is_vllms_first_draft(engines, texts, stock_drafts, monkeypatch):
    engine = engines.tree(12, depth=3, top_k=4)
    oracle = Oracle(engine, monkeypatch, seed=1)
    oracle.know(PROMPTS, texts)
    assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    compared = [text for text in oracle.drafted if text in stock_drafts]
    assert len(compared) > 30
    for text in compared:
        assert int(oracle.drafted[text]["tokens_BN"][1]) == stock_drafts[text][0]


def naive_head(pair: tiny.Pair) -> NaiveHead:
    model = load_target(pair.target, torch.float32)
    tensors = load_file(pair.head / "model.safetensors")
    config = HeadConfig.from_target(model.config, len(tensors["d2t"]))
    target = Target(model, config.aux_layer_ids)
    ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    head = Eagle3Head(config, target.embedding, ids)
    head.load_state_dict(tensors)
    return NaiveHead(target, head)


@pytest.mark.parametrize(
    ("num_drafts", "depth", "top_k", "budget"),
    # With 70 rows the draft grows the trees of eight requests in two groups.
    [(20, 4, 3, 1024), (63, 5, 8, 1024), (3, 2, 2, 1024), (4, 1, 6, 1024), (31, 4, 14, 70)],
)
def test_growth_equals_a_head_without_a_cache(
    engines, pair, texts, monkeypatch, num_drafts, depth, top_k, budget
):
    engine = engines.tree(num_drafts, depth, top_k, max_num_batched_tokens=budget)
    oracle = Oracle(engine, monkeypatch, seed=num_drafts)
    oracle.know(PROMPTS, texts)
    short = 16
    assert engine.generate(PROMPTS, sampling(short)) == [text[:short] for text in texts]
    assert oracle.count["accepted"] > 20
    head = naive_head(pair)
    drawn = [text for text in oracle.drafted if text][:: max(1, len(oracle.drafted) // 6)]
    assert len(drawn) >= 5
    for text in drawn:
        assert_drafted(oracle.drafted[text], head.tree(text, depth, top_k, num_drafts + 1))


def test_trees_grown_in_groups_are_those_grown_at_once(engines, plain):
    texts = plain.generate(PROMPTS, sampling(12))
    drafted = []
    # 70 rows hold the frontiers of five of the eight requests.
    for budget in (1024, 70):
        engine = engines.tree(4, 3, 14, max_num_batched_tokens=budget)
        with pytest.MonkeyPatch.context() as patch:
            # It knows no text, so that both engines draft after every token.
            oracle = Oracle(engine, patch)
            assert engine.generate(PROMPTS, sampling(12)) == texts
        drafted.append(oracle.drafted)
    at_once, in_groups = drafted
    common = [text for text in in_groups if text and text in at_once]
    assert len(common) > 80
    for text in common:
        for name, value in at_once[text].items():
            torch.testing.assert_close(in_groups[text][name], value, rtol=1e-4, atol=1e-4)
