"""Targets most of whose layers see a window: groups of layers that overlay one KV cache."""

import json
from pathlib import Path

import pytest

from tests.engine import tiny
from tests.engine.engines import Engines, random_prompts, sampling
from tests.engine.oracle import Oracle
from tests.engine.replay import Graphs

PROMPTS = random_prompts(8, seed=11)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    pair = tiny.write_pair(tmp_path_factory.mktemp("windowed"))
    path: Path = pair.target / "config.json"
    window = {
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 4,
        "sliding_window": 20,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | window))
    return Engines(pair)


@pytest.mark.parametrize("graphs", [False, True])
def test_sliding_window_layers_beside_full_ones(windowed, monkeypatch, graphs):
    expected = windowed.get().generate(PROMPTS, sampling(40))
    engine = windowed.tree(16, 5, 4)
    assert len(engine.runner.kv_cache_config.kv_cache_groups) > 1
    oracle = Oracle(engine, monkeypatch)
    oracle.know(PROMPTS, expected)
    if graphs:
        Graphs(engine, monkeypatch, num_reqs=[1, 4, 8])
    assert engine.generate(PROMPTS, sampling(40)) == expected
    # Prompts out of the prefix cache: blocks that compaction has filled.
    assert engine.generate(PROMPTS, sampling(40)) == expected
    assert oracle.count["accepted"] > 200
    assert oracle.count["moved"] > 40
