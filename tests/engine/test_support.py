"""What trees would corrupt is refused: by settings, and in the layers that are loaded."""

import json
import shutil
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine import tiny
from tests.engine.engines import tree
from tests.engine.layers import GPU
from tests.engine.test_activation import configure
from vllm_eagle3.engine import activation, support


def layer(**changes: Any) -> SimpleNamespace:
    plain = {"alibi_slopes": None, "sinks": None, "kv_sharing_target_layer_name": None}
    impl = {name: changes.pop(name, value) for name, value in plain.items()}
    scales = {name: torch.tensor(0.5) for name in ("_q_scale", "_k_scale", "_v_scale")}
    values = {"kv_cache_dtype": "auto", **scales, **changes}
    return SimpleNamespace(impl=SimpleNamespace(**impl), **values)


@pytest.fixture
def gpu(monkeypatch: Any) -> Any:
    """A GPU of compute capability 8.9, or of another after a call with it."""

    def make(capability: int) -> None:
        of_platform = {"has_device_capability": lambda least: capability >= least}
        monkeypatch.setattr(
            support, "current_platform", SimpleNamespace(**{**vars(GPU), **of_platform})
        )

    make(89)
    return make


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_caches_with_a_scale_a_layer_serve(gpu, dtype, shape):
    support.check_layer("model.layers.0", layer(kv_cache_dtype=dtype, _k_scale=torch.ones(shape)))


@pytest.mark.parametrize(
    "dtype", ["fp8_e5m2", "fp8_per_token_head", "int4_per_token_head", "nvfp4", "turboquant_k8v4"]
)
def test_other_quantised_caches_do_not(gpu, dtype):
    with pytest.raises(ValueError, match=rf"kv_cache_dtype={dtype} \(model\.layers\.0\): use"):
        support.check_layer("model.layers.0", layer(kv_cache_dtype=dtype))


@pytest.mark.parametrize("scale", ["_q_scale", "_k_scale", "_v_scale"])
def test_a_scale_for_each_head_counts_where_it_is_used(gpu, scale):
    of_heads = {scale: torch.ones(8)}
    support.check_layer("model.layers.0", layer(**of_heads))
    with pytest.raises(ValueError, match=r"scale for each head.*use kv_cache_dtype=bfloat16"):
        support.check_layer("model.layers.0", layer(kv_cache_dtype="fp8", **of_heads))


def test_a_gpu_without_e4m3_is_named(gpu):
    gpu(86)
    support.check_layer("model.layers.0", layer())
    with pytest.raises(ValueError, match=r"kv_cache_dtype=fp8 on this machine.*capability 8\.9"):
        support.check_layer("model.layers.0", layer(kv_cache_dtype="fp8"))


@pytest.mark.parametrize("feature", ["alibi_slopes", "sinks", "kv_sharing_target_layer_name"])
def test_features_that_tree_attention_lacks(feature):
    with pytest.raises(ValueError, match=rf"{feature} \(model\.layers\.0\): .*chain"):
        support.check_layer("model.layers.0", layer(**{feature: torch.ones(2)}))


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
