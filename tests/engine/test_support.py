"""What a loaded layer must be: a checkpoint may have made of it what no setting tells."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.layers import GPU
from vllm_eagle3.engine import support


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
