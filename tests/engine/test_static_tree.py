"""Static trees: the nodes of their paths in every step, and the text of plain vLLM."""

from typing import Any

import pytest
import torch

from tests.engine import tiny
from tests.engine.engines import Engine, Engines, Tokens, chain, random_prompts, sampling
from tests.engine.naive_head import ServedHead, assert_drafted, served_head
from tests.engine.oracle import Oracle
from tests.engine.replay import Graphs
from tests.engine.test_activation import configure
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine import activation

# Shallow nodes stand after deep ones, and two nodes of a level have children.
PATHS = [[0], [0, 0], [0, 0, 0], [1], [1, 0], [0, 1], [2], [1, 0, 0], [1, 0, 1]]
NUM_TOKENS = 16
PROMPTS = random_prompts(6, seed=17)


@pytest.fixture(scope="module", params=["eagle3", "eagle1"])
def head(request: Any, pair: tiny.Pair, tmp_path_factory: pytest.TempPathFactory) -> ServedHead:
    return served_head(tmp_path_factory.mktemp("static") / request.param, pair, request.param)


@pytest.fixture(scope="module")
def texts(plain: Engine) -> list[Tokens]:
    return plain.generate(PROMPTS, sampling(NUM_TOKENS))


def speculative(pair: tiny.Pair, paths: Any, method: str = "eagle3", **extra: Any) -> dict:
    """Without num_speculative_tokens, which follows from the paths."""
    config = chain(pair, 0, method=method, **extra)
    del config["num_speculative_tokens"]
    return {**config, "tree": {"paths": paths, "verify_budget": None}}


def drafting(engines: Engines, head: ServedHead, paths: Any, **extra: Any) -> Engine:
    config = speculative(head.pair, paths, head.method, **extra)
    return engines.get(speculative_config=config)


@pytest.mark.parametrize("paths", [PATHS, "mc_sim_7b_63"], ids=["list", "named"])
def test_the_nodes_are_the_paths(engines, head, texts, monkeypatch, paths):
    engine = drafting(engines, head, paths)
    oracle = Oracle(engine, monkeypatch, seed=1)
    oracle.know(PROMPTS, texts)
    assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    assert oracle.count["accepted"] > 30
    assert oracle.count["moved"] > 8
    drawn = [text for text in oracle.drafted if text][::12]
    assert len(drawn) >= 3
    static = TreeConfig.static(paths)
    for text in drawn:
        assert_drafted(oracle.drafted[text], head.naive.static_tree(text, static.paths))


def test_the_heads_own_drafts_serve(engines, plain, head):
    """No oracle: the trees as drafted, and requests that are served as a chain among them."""
    kinds = {}, {"repetition_penalty": 1.2}, {"temperature": 0.8, "seed": 3}
    params = [sampling(8, **kind) for kind in kinds]
    expected = plain.generate(PROMPTS[:3], params)
    assert drafting(engines, head, PATHS).generate(PROMPTS[:3], params) == expected


def test_whole_steps_in_graphs_of_every_size(engines, head, texts, monkeypatch):
    """Larger batches verify the first paths only."""
    schedule = [[1, 2, 9], [3, 4, 4], [5, 8, 1]]
    engine = drafting(engines, head, PATHS, num_speculative_tokens_per_batch_size=schedule)
    oracle = Oracle(engine, monkeypatch, seed=2)
    oracle.know(PROMPTS, texts)
    graphs = Graphs(engine, monkeypatch, num_reqs=[1, 2, 4, 6], rows=[10, 5, 2])
    arrivals = [(i // 3, p, sampling(NUM_TOKENS)) for i, p in enumerate(PROMPTS)]
    assert engine.serve(arrivals) == texts
    assert {9, 4, 1} <= set(oracle.lengths)
    assert sum(n for (what, _), n in graphs.replays.items() if what == "round") > 3


def test_the_drafts_of_a_graph_are_those_without(engines, head, texts):
    engine = drafting(engines, head, PATHS)
    drafted = []
    for in_graphs in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            oracle = Oracle(engine, patch)  # it knows no text
            if in_graphs:
                graphs = Graphs(engine, patch, num_reqs=[1, 2, 4, 6])
            engine.llm.reset_prefix_cache()
            short = [text[:8] for text in texts]
            assert engine.generate(PROMPTS, sampling(8)) == short
            drafted.append(oracle.drafted)
    assert graphs.replays["round", 6] > 3
    common = [text for text in drafted[0] if text and text in drafted[1]]
    assert len(common) > 20
    for text in common:
        for name, value in drafted[0][text].items():
            torch.testing.assert_close(drafted[1][text][name], value, rtol=1e-4, atol=1e-4)


def test_the_paths_travel_in_the_additional_config(pair):
    config = configure(pair, speculative(pair, "mc_sim_7b_63"))
    assert config.speculative_config.num_speculative_tokens == 25
    assert activation.tree_config(config) == TreeConfig.static("mc_sim_7b_63", verify_budget=None)


def test_static_trees_shrink_as_requests_become_more(pair):
    config = speculative(pair, "mc_sim_7b_63") | {"tree": {"paths": "mc_sim_7b_63"}}
    schedule = configure(pair, config).speculative_config.num_speculative_tokens_per_batch_size
    assert [tuple(tier) for tier in schedule][:3] == [(1, 4, 25), (5, 8, 15), (9, 16, 7)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_speculative_tokens": 63}, "num_speculative_tokens=63 but tree.paths has 25 nodes"),
        ({"tree": {"paths": "mc_sim_7b_63", "depth": 5}}, "tree has paths, .* and 'depth'"),
        ({"tree": {"paths": [[0, 0]]}}, r"\[0, 0\] without \[0\] before it"),
    ],
)
def test_a_wrong_static_tree(pair, change, message):
    with pytest.raises(ValueError, match=message):
        configure(pair, speculative(pair, "mc_sim_7b_63") | change)
