"""Heads that take one state of the target: EAGLE-1's last one, and EAGLE-3's without fusion.

EAGLE-2 and HASS heads are EAGLE-1 heads to an engine.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import tiny
from tests.engine.engines import Engine, Engines, Tokens, chain, random_prompts, sampling, tree
from tests.engine.naive_head import ServedHead, assert_drafted, served_head, write_head
from tests.engine.oracle import Oracle
from tests.engine.replay import Graphs
from tests.engine.test_activation import configure
from tests.engine.test_growth import drafts_of_the_chain
from vllm_eagle3.train.export import export
from vllm_eagle3.train.features import load_target
from vllm_eagle3.train.objectives import OBJECTIVES

DEPTH = 4
NUM_TOKENS = 16
PROMPTS = random_prompts(6, seed=11)


@pytest.fixture(scope="module", params=["eagle1", "eagle3-top"])
def head(request: Any, pair: tiny.Pair, tmp_path_factory: pytest.TempPathFactory) -> ServedHead:
    return served_head(tmp_path_factory.mktemp("one-state") / request.param, pair, request.param)


@pytest.fixture(scope="module")
def texts(plain: Engine) -> list[Tokens]:
    return plain.generate(PROMPTS, sampling(NUM_TOKENS))


def drafting(engines: Engines, head: ServedHead, *shape: int, **settings: Any) -> Engine:
    speculative = tree(head.pair, *shape, method=head.method)
    return engines.get(speculative_config=speculative, **settings)


def test_the_drafted_tree_is_the_heads(engines, head, texts, monkeypatch):
    engine = drafting(engines, head, 20, DEPTH, 3)
    oracle = Oracle(engine, monkeypatch)
    oracle.know(PROMPTS, texts)
    assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    assert oracle.count["accepted"] > 30
    assert oracle.count["moved"] > 8
    drawn = [text for text in oracle.drafted if text][::6]
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
    assert len(common) > 20
    for text in common:
        assert tuple(oracle.drafted[text]["tokens_BN"][1:].tolist()) == expected[text]


def test_whole_steps_in_graphs(engines, head, texts, monkeypatch):
    engine = drafting(engines, head, 20, DEPTH, 3)
    graphs = Graphs(engine, monkeypatch, num_reqs=[1, 3, 6])
    oracle = Oracle(engine, monkeypatch, seed=2)
    oracle.know(PROMPTS, texts)
    assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    assert graphs.replays["target", 6] > 1
    assert graphs.replays["round", 6] > 1


def write_easy_pair(root: Path) -> tiny.Pair:
    """A target that looks at its last token only, and an EAGLE-1 head that nearly knows it.

    The target's layers add nothing, so that its feature is the normed embedding of the token;
    the head takes the embedding, disturbed, for its prediction of the next feature.
    """
    model = load_target(tiny.write_target(root / "target"), torch.float32)
    silence(model)
    model.save_pretrained(root / "target")
    naive = write_head(root / "head", root / "target", OBJECTIVES["eagle1"])
    silence(naive.head)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(tiny.HIDDEN, tiny.HIDDEN, generator=generator)
    with torch.no_grad():
        fc = torch.eye(tiny.HIDDEN) + 0.07 * noise
        naive.head.fc.weight.copy_(torch.cat([fc, torch.zeros_like(fc)], dim=1))
    export(naive.head, root / "head", dtype="float32")
    return tiny.Pair(root / "target", root / "head")


def silence(model: torch.nn.Module) -> None:
    """Keep attention and MLP of all layers from adding anything."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()


def test_more_is_accepted_than_of_a_chain(tmp_path):
    pair = write_easy_pair(tmp_path)
    texts = Engine(pair).generate(PROMPTS, sampling(NUM_TOKENS))

    def accepted(speculative: dict[str, Any]) -> int:
        engine = Engine(pair, speculative_config=speculative)
        assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
        return engine.metric("spec_decode_num_accepted_tokens")

    of_chain = accepted(chain(pair, 3, method="eagle"))
    of_tree = accepted(tree(pair, 12, 3, 4, method="eagle"))
    static = {"paths": [[0], [1], [0, 0], [2], [0, 1], [1, 0], [0, 0, 0]], "verify_budget": None}
    of_static = accepted(chain(pair, 7, method="eagle") | {"tree": static})
    assert of_tree > of_static > of_chain > 10


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
