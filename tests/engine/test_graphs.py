"""Steps that replay whole graphs emit the tokens of plain vLLM, in batches of every size."""

import pytest

from tests.engine.engines import random_prompts, sampling
from tests.engine.oracle import Oracle
from tests.engine.replay import Graphs

SHAPE = {"num_drafts": 10, "depth": 3, "top_k": 3}
PROMPTS = random_prompts(8, seed=23)
NUM_TOKENS = 120


@pytest.fixture(scope="module")
def texts(plain):
    return plain.generate(PROMPTS, sampling(NUM_TOKENS))


def test_batches_of_every_size(engines, texts, monkeypatch):
    engine = engines.tree(**SHAPE)
    oracle = Oracle(engine, monkeypatch, seed=4)
    oracle.know(PROMPTS, texts)
    graphs = Graphs(engine, monkeypatch, num_reqs=[1, 2, 5, 8])
    lengths = [NUM_TOKENS, 110, 96, 80, 64, 48, 30, 12]
    arrivals = [(0, p, sampling(n)) for p, n in zip(PROMPTS, lengths, strict=True)]
    outputs = engine.serve(arrivals)
    assert outputs == [text[:n] for text, n in zip(texts, lengths, strict=True)]
    for what in ("target", "round"):
        assert {size for kind, size in graphs.replays if kind == what} == {1, 2, 5, 8}
    assert graphs.padded > 5
    assert oracle.count["accepted"] > 200
    assert oracle.count["moved"] > 40


def test_prompts_that_arrive_between_replays(engines, texts, monkeypatch):
    """Mixed steps run piece by piece, and the growth replays a graph of its own."""
    engine = engines.tree(**SHAPE)
    oracle = Oracle(engine, monkeypatch, seed=5)
    oracle.know(PROMPTS, texts)
    graphs = Graphs(engine, monkeypatch, num_reqs=[1, 2, 4, 8])
    arrivals = [(3 * i, prompt, sampling(60)) for i, prompt in enumerate(PROMPTS)]
    assert engine.serve(arrivals) == [text[:60] for text in texts]
    assert oracle.count["mixed"] >= 4
    assert sum(n for (what, _), n in graphs.replays.items() if what == "growth") >= 4
    assert graphs.replays["target", 1] > 0
    # Behind blocks that the compaction of replayed steps has filled.
    again = [prompt + text[:40] for prompt, text in zip(PROMPTS, texts, strict=True)]
    assert engine.generate(again, sampling(20)) == [text[40:60] for text in texts]


def test_trees_that_shrink_as_requests_become_more(engines, texts, monkeypatch):
    schedule = [[1, 2, 10], [3, 4, 7], [5, 6, 3], [7, 8, 1]]
    engine = engines.tree(**SHAPE, speculative={"num_speculative_tokens_per_batch_size": schedule})
    oracle = Oracle(engine, monkeypatch, seed=8)
    oracle.know(PROMPTS, texts)
    graphs = Graphs(engine, monkeypatch, num_reqs=[1, 2, 3, 4, 6, 8], rows=[11, 8, 4, 2])
    lengths = [NUM_TOKENS, 110, 96, 80, 64, 48, 30, 12]
    arrivals = [
        (2 * i, p, sampling(n)) for i, (p, n) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
    outputs = engine.serve(arrivals)
    assert outputs == [text[:n] for text, n in zip(texts, lengths, strict=True)]
    assert {10, 7, 3, 1} <= set(oracle.lengths)
    assert {size for kind, size in graphs.replays if kind == "round"} >= {1, 2, 4, 8}
    assert oracle.count["accepted"] > 100


@pytest.mark.parametrize(
    ("schedule", "rows"), [(None, None), ([[1, 2, 12], [3, 5, 7], [6, 8, 3]], [13, 8, 4])]
)
def test_the_drafts_of_a_graph_are_those_without(engines, texts, schedule, rows):
    """Of whole rounds, and of growth behind steps with a prompt in them."""
    more = {"speculative": {"num_speculative_tokens_per_batch_size": schedule}} if schedule else {}
    engine = engines.tree(12, depth=4, top_k=4, **more)
    arrivals = [(2 * i, prompt, sampling(20)) for i, prompt in enumerate(PROMPTS)]
    drafted = []
    for with_graphs in (False, True):
        engine.llm.reset_prefix_cache()
        with pytest.MonkeyPatch.context() as patch:
            oracle = Oracle(engine, patch)  # it knows no text: a token a step
            if with_graphs:
                graphs = Graphs(engine, patch, num_reqs=[2, 5, 8], rows=rows)
            engine.serve(arrivals)
            drafted.append(oracle.drafted)
    without, captured = drafted
    for what in ("round", "growth"):
        assert {size for kind, size in graphs.replays if kind == what} >= {2, 5, 8}
    common = [text for text in without if text in captured]
    assert len(common) > 120
    for text in common:
        for name in ("tokens_BN", "parents_BN", "ancestor_bits_BN"):
            assert captured[text][name].tolist() == without[text][name].tolist()


def test_a_graph_without_its_masks_is_caught(engines, texts, monkeypatch):
    """The control: rows that the step no longer fills in leave the graph with old ones."""
    engine = engines.tree(**SHAPE)
    oracle = Oracle(engine, monkeypatch, seed=6)
    oracle.know(PROMPTS, texts)
    Graphs(engine, monkeypatch, num_reqs=[8])
    batch = engine.runner.model_state.tree.batch
    prepare = batch.prepare

    def stale(*args):
        bits = batch.ancestor_bits_T.clone()
        prepare(*args)
        batch.ancestor_bits_T.copy_(bits)

    monkeypatch.setattr(batch, "prepare", stale)
    outputs = engine.generate(PROMPTS, sampling(24))
    assert outputs != [text[:24] for text in texts]
    engine.llm.reset_prefix_cache()
