"""What turns a tree on, what is refused and how, and that nothing else notices the plugin."""

import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine import tiny
from tests.engine.engines import Engines, chain, random_prompts, sampling, tree
from tests.engine.layers import GPU
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine import activation, plugin, support


def configure(pair: tiny.Pair, speculative: dict[str, Any] | None, **settings: Any) -> Any:
    """What `LLM(...)` and `vllm serve` do before anything is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(pair.target),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        speculative_config=speculative,
        **settings,
    ).create_engine_config()


def test_the_tree_travels_in_the_additional_config(pair):
    config = configure(pair, tree(pair, 20, depth=4, top_k=5))
    expected = TreeConfig(20, depth=4, top_k=5, verify_budget=None)
    assert activation.tree_config(config) == expected
    assert config.speculative_config.num_speculative_tokens == 20
    assert activation.tree_config(pickle.loads(pickle.dumps(config))) == expected


def test_trees_shrink_as_requests_become_more(pair):
    speculative = chain(pair, 31) | {"tree": {"depth": 6, "top_k": 8, "verify_budget": 64}}
    config = configure(pair, speculative).speculative_config
    schedule = [(1, 2, 31), (3, 4, 15), (5, 8, 7)]
    tiers = [tuple(tier) for tier in config.num_speculative_tokens_per_batch_size]
    assert tiers[:3] == schedule
    mine = chain(pair, 31, num_speculative_tokens_per_batch_size=[[1, 64, 8]])
    config = configure(pair, {**mine, "tree": True}).speculative_config
    assert [tuple(t) for t in config.num_speculative_tokens_per_batch_size] == [(1, 64, 8)]
    config = configure(pair, tree(pair, 31, 6, 8)).speculative_config  # verify_budget is None
    assert config.num_speculative_tokens_per_batch_size is None
    with pytest.raises(ValueError, match="give one of them"):
        configure(pair, {**mine, "tree": {"verify_budget": 64}})


def test_true_takes_the_defaults(pair):
    speculative = {"method": "eagle3", "model": str(pair.head), "tree": True}
    config = configure(pair, speculative)
    assert activation.tree_config(config) == TreeConfig(63)
    assert "tree" in speculative  # the caller's dict is not changed


def test_a_tree_keeps_no_slots_beyond_its_own(pair):
    assert configure(pair, tree(pair, 31, 6, 8)).num_lookahead_tokens == 1
    assert configure(pair, chain(pair, 5)).num_lookahead_tokens == 5


def test_logprobs_of_chosen_tokens_are_refused_with_a_tree(pair):
    from vllm import SamplingParams

    asked = SamplingParams(logprob_token_ids=[3, 4], max_tokens=5)
    with pytest.raises(ValueError, match="logprob_token_ids is not reported"):
        asked._validate_spec_decode(configure(pair, tree(pair, 31, 6, 8)).speculative_config)
    asked._validate_spec_decode(configure(pair, chain(pair, 5)).speculative_config)


def test_without_a_tree_the_config_is_stock(pair):
    config = configure(pair, chain(pair, 5))
    assert config.additional_config == {}
    assert activation.tree_config(config) is None
    assert configure(pair, None).speculative_config is None


@pytest.mark.parametrize("parameter", [{"min_p": 0.1}, {"logit_bias": {3: 1.0}}])
def test_min_p_and_logit_bias_pass_with_a_tree_only(pair, parameter):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    params = SamplingParams(**parameter)
    with_tree = pickle.loads(pickle.dumps(configure(pair, tree(pair, 8, depth=3, top_k=4))))
    params._validate_spec_decode(with_tree.speculative_config)
    with pytest.raises(VLLMValidationError, match="not yet supported with speculative"):
        params._validate_spec_decode(configure(pair, chain(pair, 5)).speculative_config)


def test_without_a_tree_the_speculator_is_stock(engines: Engines, pair):
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    runner = engines.get(speculative_config=chain(pair, 5)).runner
    assert type(runner.speculator) is EagleSpeculator
    assert type(runner.model_state) is DefaultModelState
    assert type(runner.rejection_sampler) is RejectionSampler


def test_registering_twice_wraps_once():
    import vllm.v1.worker.gpu.spec_decode as spec_decode
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    assert plugin.is_registered()
    before = EngineArgs.create_engine_config, spec_decode.init_speculator
    plugin.register()
    assert before == (EngineArgs.create_engine_config, spec_decode.init_speculator)


def _describe(connection: Any, pickled: bytes) -> None:
    """In another process: vLLM's own way to the plugin, and the config out of its pickle."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = pickle.loads(pickled)
    connection.send((plugin.is_registered(), activation.tree_config(config)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_find_the_plugin(pair, method):
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    pickled = pickle.dumps(configure(pair, tree(pair, 12, depth=3, top_k=4)))
    process = context.Process(target=_describe, args=(theirs, pickled))
    process.start()
    try:
        assert ours.poll(120), "the other process says nothing"
        assert ours.recv() == (True, TreeConfig(12, depth=3, top_k=4, verify_budget=None))
    finally:
        process.join(10)
        process.kill()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tree": {"depth": 4, "width": 3}}, r"unknown key 'width' in tree: use depth, top_k, ver"),
        ({"tree": {"depth": 0, "top_k": 4}}, r"tree\.depth must be an integer of at least 1"),
        ({"tree": {"depth": 3, "top_k": 0}}, r"tree\.top_k must be an integer of at least 1"),
        ({"tree": {"depth": 1, "top_k": 4}}, r"num_speculative_tokens=12 is more than.*raise tree"),
        ({"tree": 5}, r"tree must be true or an object"),
        ({"num_speculative_tokens": 64}, r"num_speculative_tokens=64.*at most 63"),
        ({"num_speculative_tokens": 0}, r"num_speculative_tokens"),
        ({"method": "eagle"}, r'is an EAGLE-3 head: set "method": "eagle3"'),
        ({"method": "ngram"}, r'tree needs "method": "eagle3" or "eagle".*got \'ngram\''),
        ({"model": None}, r'tree needs "model"'),
        ({"model": "/no/such/head"}, r"/no/such/head: no such directory"),
        ({"tree": {"depth": 1, "top_k": 257}}, r"tree\.top_k=257.*vocabulary of 256.*lower"),
        ({"rejection_sample_method": "synthetic"}, r"rejection_sample_method"),
        ({"draft_sample_method": "probabilistic"}, r"draft_sample_method"),
    ],
)
def test_a_wrong_speculative_config(pair, change, message):
    speculative = {**tree(pair, 12, depth=3, top_k=4), **change}
    if change.get("rejection_sample_method"):
        speculative["synthetic_acceptance_length"] = 2.0
    with pytest.raises(ValueError, match=message):
        configure(pair, speculative)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 2}, r"tensor_parallel_size=2: use tensor_parallel_size=1"),
        ({"pipeline_parallel_size": 2}, r"pipeline_parallel_size=2"),
        ({"kv_cache_dtype": "fp8_e5m2"}, r"kv_cache_dtype=fp8_e5m2: use kv_cache_dtype=fp8"),
        ({"kv_cache_dtype": "int8_per_token_head"}, r"kv_cache_dtype=int8_per_token_head: use"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            r"kv_transfer_config.*remove it",
        ),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 2}, r"max_num_batched_tokens"),
    ],
)
def test_an_unsupported_setting(pair, settings, message):
    with pytest.raises(ValueError, match=message):
        configure(pair, tree(pair, 12, depth=3, top_k=4), **settings)


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3"])
def test_an_e4m3_cache_needs_a_gpu_that_reads_it(pair, monkeypatch, dtype):
    speculative = tree(pair, 12, depth=3, top_k=4)
    with pytest.raises(ValueError, match=rf"kv_cache_dtype={dtype} on this machine: use"):
        configure(pair, speculative, kv_cache_dtype=dtype)
    monkeypatch.setattr(support, "current_platform", GPU)
    config = configure(pair, speculative, kv_cache_dtype=dtype)
    assert config.cache_config.cache_dtype == dtype


def test_the_drafts_own_cache_is_looked_at_too(pair):
    speculative = {**tree(pair, 12, depth=3, top_k=4), "kv_cache_dtype": "fp8_e5m2"}
    with pytest.raises(ValueError, match=r"the draft's kv_cache_dtype=fp8_e5m2: use"):
        configure(pair, speculative)


def test_the_first_model_runner_is_refused(pair, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    from vllm import envs

    envs.disable_envs_cache()
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1"):
        configure(pair, tree(pair, 12, depth=3, top_k=4))


def without_fc(head: Path) -> None:
    tensors = tiny.head_tensors()
    del tensors["fc.weight"]
    save_file(tensors, head / "model.safetensors")


def as_eagle1(head: Path) -> None:
    hidden = torch.zeros(tiny.HIDDEN, 2 * tiny.HIDDEN)
    tensors = {"fc.weight": hidden, "fc.bias": hidden[:, 0].clone()}
    save_file({**tiny.head_tensors(), **tensors}, head / "model.safetensors")


def truncated(head: Path) -> None:
    whole = (head / "model.safetensors").read_bytes()
    (head / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def for_another_hidden_size(head: Path) -> None:
    tensors = tiny.head_tensors(hidden_size=64)
    save_file(tensors, head / "model.safetensors")
    (head / "config.json").write_text(json.dumps(tiny.head_config(hidden_size=64)))


def for_another_vocabulary(head: Path) -> None:
    save_file(tiny.head_tensors(vocab_size=640), head / "model.safetensors")
    (head / "config.json").write_text(json.dumps(tiny.head_config(vocab_size=640)))


def with_ids_that_vllm_does_not_find(head: Path) -> None:
    ids = {"conventions": "vllm", "eagle_aux_hidden_state_layer_ids": [2, 3, 6]}
    (head / "config.json").write_text(json.dumps(tiny.head_config() | {"eagle_config": ids}))


def of_a_state_that_vllm_does_not_find(head: Path) -> None:
    one = {"fc.weight": torch.zeros(tiny.HIDDEN, tiny.HIDDEN)}
    save_file(tiny.head_tensors() | one, head / "model.safetensors")
    ids = {"conventions": "vllm", "eagle_aux_hidden_state_layer_ids": [tiny.LAYERS]}
    (head / "config.json").write_text(json.dumps(tiny.head_config() | {"eagle_config": ids}))


def without_weights(head: Path) -> None:
    (head / "model.safetensors").unlink()


def without_config(head: Path) -> None:
    (head / "config.json").unlink()


def with_a_missing_shard(head: Path) -> None:
    index = {"weight_map": {"fc.weight": "model-00002-of-00002.safetensors"}}
    (head / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_fc, "not an EAGLE-3 head"),
        (as_eagle1, "not an EAGLE-3 head"),
        (truncated, "is truncated"),
        (for_another_hidden_size, "hidden size 64, .*has 128: use the head of this target"),
        (for_another_vocabulary, "vocabulary of 640 tokens, .*has 512: use the head of this"),
        (with_ids_that_vllm_does_not_find, r"captures \[2, 4, 5\], not \[2, 3, 6\]: convert it"),
        (of_a_state_that_vllm_does_not_find, r"captures three layers, fc takes 1: convert it"),
        (without_weights, "no weights"),
        (without_config, "no config.json"),
        (with_a_missing_shard, "model-00002-of-00002.safetensors is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_head(pair, tmp_path, damage: Callable[[Path], None], message):
    head = tmp_path / "head"
    shutil.copytree(pair.head, head)
    damage(head)
    with pytest.raises(ValueError, match=message) as error:
        configure(pair, tree(tiny.Pair(pair.target, head), 12, depth=3, top_k=4))
    assert str(head) in str(error.value)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (63, 6, 12), (8, 1, 8)])
def test_shapes_at_the_limits_serve(engines, plain, shape):
    """The head's own trees, from one node to sixty-three."""
    prompts = random_prompts(3, seed=41)
    expected = plain.generate(prompts, sampling(12))
    assert engines.tree(*shape).generate(prompts, sampling(12)) == expected
