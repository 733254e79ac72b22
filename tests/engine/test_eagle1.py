"""Heads that take one state of the target: EAGLE-1's last one, and EAGLE-3's without fusion.

EAGLE-2 and HASS heads are EAGLE-1 heads to an engine.
"""

from typing import Any, NamedTuple

import pytest

from tests.engine import tiny
from tests.engine.engines import Engine, Engines, Tokens, chain, random_prompts, sampling, tree
from tests.engine.naive_head import NaiveHead, assert_drafted, write_head
from tests.engine.oracle import Oracle
from tests.engine.replay import Graphs
from tests.engine.test_activation import configure
from tests.engine.test_growth import drafts_of_the_chain
from vllm_eagle3.train.objectives import OBJECTIVES

DEPTH = 4
NUM_TOKENS = 24
PROMPTS = random_prompts(8, seed=11)


class Head(NamedTuple):
    """A head on disk, its speculative method, and the same in PyTorch."""

    pair: tiny.Pair
    method: str
    naive: NaiveHead


@pytest.fixture(scope="module", params=["eagle1", "eagle3-top"])
def head(request: Any, pair: tiny.Pair, tmp_path_factory: pytest.TempPathFactory) -> Head:
    objective = OBJECTIVES[request.param]
    path = tmp_path_factory.mktemp("one-state") / request.param
    naive = write_head(path, pair.target, objective)
    return Head(tiny.Pair(pair.target, path), objective.method, naive)


@pytest.fixture(scope="module")
def texts(plain: Engine) -> list[Tokens]:
    return plain.generate(PROMPTS, sampling(NUM_TOKENS))


def drafting(engines: Engines, head: Head, *shape: int, **settings: Any) -> Engine:
    speculative = tree(head.pair, *shape, method=head.method)
    return engines.get(speculative_config=speculative, **settings)


def test_the_drafted_tree_is_the_heads(engines, head, texts, monkeypatch):
    engine = drafting(engines, head, 20, DEPTH, 3)
    oracle = Oracle(engine, monkeypatch)
    oracle.know(PROMPTS, texts)
    assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    assert oracle.count["accepted"] > 60
    assert oracle.count["moved"] > 15
    drawn = [text for text in oracle.drafted if text][::10]
    assert len(drawn) >= 5
    for text in drawn:
        assert_drafted(oracle.drafted[text], head.naive.tree(text, DEPTH, 3, num_nodes=21))


def test_one_child_a_node_is_vllms_chain(engines, head, texts, monkeypatch):
    stock = engines.get(speculative_config=chain(head.pair, DEPTH, method=head.method))
    with pytest.MonkeyPatch.context() as patch:
        expected = drafts_of_the_chain(stock, patch)
        assert stock.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    engine = drafting(engines, head, DEPTH, DEPTH, 1)
    oracle = Oracle(engine, monkeypatch, seed=1)
    oracle.know(PROMPTS, texts)
    assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    common = [text for text in oracle.drafted if text in expected]
    assert len(common) > 40
    for text in common:
        assert tuple(oracle.drafted[text]["tokens_BN"][1:].tolist()) == expected[text]


def test_whole_steps_in_graphs(engines, head, texts, monkeypatch):
    engine = drafting(engines, head, 20, DEPTH, 3)
    graphs = Graphs(engine, monkeypatch, num_reqs=[1, 4, 8])
    oracle = Oracle(engine, monkeypatch, seed=2)
    oracle.know(PROMPTS, texts)
    assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    assert graphs.replays["target", 8] > 2
    assert graphs.replays["round", 8] > 2


def test_more_is_accepted_than_of_a_chain(pair, texts, tmp_path):
    """The head is random: what it gets right is chance, of which a wide tree has more."""
    write_head(tmp_path / "head", pair.target, OBJECTIVES["eagle1"])
    random = tiny.Pair(pair.target, tmp_path / "head")

    def accepted(speculative: dict[str, Any]) -> int:
        engine = Engine(random, speculative_config=speculative)
        assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
        return engine.metric("spec_decode_num_accepted_tokens")

    of_tree = accepted(tree(random, 31, 2, 31, method="eagle"))
    assert of_tree > 2 * accepted(chain(random, 2, method="eagle")) + 3


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("eagle1", "eagle3", r'is an EAGLE-1.* head: set "method": "eagle"'),
        ("eagle3-top", "eagle", r'is an EAGLE-3 head: set "method": "eagle3"'),
    ],
)
def test_the_method_of_another_head(pair, tmp_path, name, method, message):
    write_head(tmp_path / "head", pair.target, OBJECTIVES[name])
    wrong = tree(tiny.Pair(pair.target, tmp_path / "head"), 8, 3, 4, method=method)
    with pytest.raises(ValueError, match=message):
        configure(pair, wrong)
