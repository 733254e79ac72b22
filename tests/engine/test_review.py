"""Layers and batches of shapes that the other tests of the engine do not have."""

import json
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.engine import tiny
from tests.engine.engines import Engines, random_prompts, sampling, tree
from tests.engine.oracle import Oracle
from tests.engine.test_activation import configure
from vllm_eagle3.engine import activation, attention, support
from vllm_eagle3.engine.compat import CommonAttentionMetadata, CPUAttentionBackend

PROMPTS = random_prompts(8, seed=11)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """A target most of whose layers see a window: groups that overlay one KV cache."""
    pair = tiny.write_pair(tmp_path_factory.mktemp("windowed"))
    path: Path = pair.target / "config.json"
    window = {
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 4,
        "sliding_window": 20,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | window))
    return Engines(pair)


def test_sliding_window_layers_beside_full_ones(windowed, monkeypatch):
    expected = windowed.get().generate(PROMPTS, sampling(40))
    engine = windowed.tree(16, 5, 4)
    assert len(engine.runner.kv_cache_config.kv_cache_groups) > 1
    oracle = Oracle(engine, monkeypatch)
    oracle.know(PROMPTS, expected)
    assert engine.generate(PROMPTS, sampling(40)) == expected
    # Prompts out of the prefix cache: blocks that compaction has filled.
    assert engine.generate(PROMPTS, sampling(40)) == expected
    assert oracle.count["accepted"] > 200
    assert oracle.count["moved"] > 40


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


def test_a_tree_for_each_batch_size(engines, plain, monkeypatch):
    """vLLM's schedule of draft counts cuts the tree to its best nodes; 1 is the root's best."""
    texts = plain.generate(PROMPTS, sampling(24))
    schedule = [[1, 2, 12], [3, 5, 1], [6, 8, 5]]
    engine = engines.tree(12, 4, 4, {"num_speculative_tokens_per_batch_size": schedule})
    oracle = Oracle(engine, monkeypatch)
    oracle.know(PROMPTS, texts)
    arrivals = [(2 * i, prompt, sampling(24 - 2 * i)) for i, prompt in enumerate(PROMPTS)]
    assert engine.serve(arrivals) == [text[: 24 - 2 * i] for i, text in enumerate(texts)]
    assert {1, 5, 12} <= set(oracle.lengths)
    assert oracle.count["accepted"] > 20


def test_a_layer_with_metadata_of_its_own_is_refused():
    """Its backend has the name of a supported one: vLLM derives it from that."""
    backend = type("ChunkedLocalAttention_8_CPUAttentionBackend", (CPUAttentionBackend,), {})
    layer = SimpleNamespace(attn_backend=backend, impl=SimpleNamespace())
    with pytest.raises(ValueError, match=r"ChunkedLocalAttention_8.*leave tree out"):
        attention.adopt({"layers.0": layer}, None)


def test_images_of_the_tail_keep_their_requests():
    starts = torch.tensor([0, 3, 6, 16], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([9, 9, 10], dtype=torch.int32),
        num_reqs=3,
        num_actual_tokens=16,
        max_query_len=10,
        max_seq_len=10,
        block_table_tensor=torch.zeros(3, 1, dtype=torch.int32),
        slot_mapping=torch.arange(16),
        mm_req_doc_ranges={0: [(1, 2)], 1: [], 2: [(4, 7)]},
    )
    rows = SimpleNamespace(num_reqs=2, num_tokens=6)
    tail = attention._tail(common, rows)
    assert tail.mm_req_doc_ranges == {0: [(4, 7)]}
    assert tail.query_start_loc.tolist() == [0, 10]


def test_what_the_rows_of_a_tree_would_corrupt_is_refused(pair, monkeypatch):
    from vllm import envs

    config = configure(pair, tree(pair, 12, depth=3, top_k=4))
    shape = activation.tree_config(config)
    support.check(config, shape)
    with monkeypatch.context() as patch:
        patch.setattr(config.aux_output_config, "enable_return_routed_experts", True)
        with pytest.raises(ValueError, match="enable_return_routed_experts: turn it off"):
            support.check(config, shape)
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_BATCH_INVARIANT", "1")
        envs.disable_envs_cache()
        with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT: unset it"):
            support.check(config, shape)
    envs.disable_envs_cache()
    installed = EntryPoint("twist", "package:Twist", "vllm.logits_processors")
    monkeypatch.setattr(support, "entry_points", lambda group: [installed])
    with pytest.raises(ValueError, match=r"twist.*uninstall"):
        support.check(config, shape)


def test_a_head_of_one_hidden_state_is_refused(pair, tmp_path):
    """vLLM would leave out the fusion and hand the speculator no captured states."""
    shutil.copytree(pair.head, tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    changed = {"eagle_config": {"use_aux_hidden_state": False}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match="use_aux_hidden_state is false"):
        configure(pair, tree(tiny.Pair(pair.target, path.parent), 12, depth=3, top_k=4))
