"""Tree attention on vLLM's Triton backend, whose cache may be e4m3, too."""

from typing import Any

import pytest
import torch

from tests.engine.layers import GPU, Layer
from tests.ops.setups import NAN, Attention, random_parents, words
from vllm_eagle3.engine import support
from vllm_eagle3.engine.attention import TreeMetadata

SEEN = [words(random_parents(seed, size)) for seed, size in enumerate([4, 5, 3])]
# Whether the cache is e4m3, and whether vLLM's layer has rounded the query.
TYPES = {"same type": (False, False), "e4m3 cache": (True, False), "all e4m3": (True, True)}


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(support, "current_platform", GPU)


def serve(case: Attention, is_e4m3: bool, is_query_e4m3: bool) -> tuple[Layer, torch.Tensor]:
    layer = Layer(case, is_e4m3, backend="triton", is_query_e4m3=is_query_e4m3)
    metadata = TreeMetadata(layer.rows(), layer.inputs["block_table_BP"])
    return layer, layer.forward(metadata)


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"window": 30}, {"softcap": 2.0}], ids=str)
def test_verification(types, dtype, settings):
    case = Attention([0, 70, 19], SEEN, dtype=dtype, **settings)
    case.assert_right(serve(case, *types)[1])


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
def test_a_level_of_the_draft_stays_unrounded_in_scratch(types):
    case = Attention([33, 7], [SEEN[0], SEEN[0]], tree_keys=[4, 4])
    layer = Layer(case, types[0], backend="triton", is_query_e4m3=types[1])
    places = [*range(4), *range(64, 68)]
    names = ("tree_key_SHD", "tree_value_SHD")
    own = {name: layer.inputs[name][places] for name in names}
    scratch = tuple(torch.full_like(layer.inputs[name], NAN) for name in names)
    metadata = TreeMetadata(layer.rows(scratch=scratch), layer.inputs["block_table_BP"])
    case.assert_right(layer.forward(metadata, **own))
    for rows, name in zip(scratch, names, strict=True):
        assert torch.equal(rows[places], own[name])


@pytest.mark.parametrize("scale", ["_q_scale", "_k_scale", "_v_scale"])
def test_every_scale_counts(scale):
    case = Attention([40, 9], SEEN[:2])
    layer, right = serve(case, True, True)
    case.assert_right(right)
    getattr(layer, scale).mul_(1.1)
    metadata = TreeMetadata(layer.rows(), layer.inputs["block_table_BP"])
    with pytest.raises(AssertionError):
        case.assert_right(layer.forward(metadata))
