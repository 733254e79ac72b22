"""An e4m3 cache: nodes count as if they, too, had been written to it and read back."""

import pytest
import torch

from tests.ops.setups import DEVICE, IMPLS, NAN, Attention, random_parents, words
from vllm_eagle3.ops import finish_tree_attention, tree_attention

E4M3 = torch.float8_e4m3fn
Q_SCALE, K_SCALE, V_SCALE = 0.013, 0.0021, 0.37
needs_e4m3 = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9),
    reason="this GPU has no e4m3; vLLM refuses such a cache on it",
)
pytestmark = needs_e4m3


def quantised(values: torch.Tensor, scale: float) -> torch.Tensor:
    """As vLLM writes its cache: to nearest, saturating."""
    return (values.float() / scale).clamp(-448, 448).to(E4M3)


def cached(case: Attention, query: bool = False) -> tuple[Attention, dict[str, torch.Tensor]]:
    """The case as a cache of e4m3 sees it, by the book, and the arguments of the operation."""
    inputs = dict(case.inputs)
    for name, scale in (("key", K_SCALE), ("value", V_SCALE)):
        units = quantised(inputs[f"{name}_cache"], scale)
        inputs[f"{name}_cache"] = units
        case.inputs[f"{name}_cache"] = (units.float() * scale).to(case.dtype)
        tree = f"tree_{name}_SHD"
        case.inputs[tree] = (quantised(inputs[tree], scale).float() * scale).to(case.dtype)
    if query:
        inputs["query_THD"] = quantised(inputs["query_THD"], Q_SCALE)
        case.inputs["query_THD"] = (inputs["query_THD"].float() * Q_SCALE).to(case.dtype)
    return case, inputs


def scales(query: bool, on_device: bool) -> dict[str, float | torch.Tensor]:
    values = {"k_scale": K_SCALE, "v_scale": V_SCALE} | ({"q_scale": Q_SCALE} if query else {})
    if not on_device:
        return values
    return {name: torch.tensor([value], device=DEVICE) for name, value in values.items()}


def make(dtype: torch.dtype = torch.float32, **settings) -> Attention:
    seen = [words(random_parents(b, size)) for b, size in enumerate([4, 5, 3])]
    return Attention([0, 70, 19], seen, dtype=dtype, **settings)


def paged(case, inputs, impl, **arguments) -> torch.Tensor:
    out = torch.full(inputs["query_THD"].shape, NAN, dtype=case.dtype, device=DEVICE)
    return tree_attention(
        **inputs, out_THD=out, sliding_window=case.window, impl=impl, **case.settings, **arguments
    )


def split(case, inputs, impl, **arguments) -> torch.Tensor:
    return paged(case, inputs, impl, num_splits=2, **arguments)


def finish(case, inputs, impl, **arguments) -> torch.Tensor:
    prefix, lse = case.by_the_book(torch.float64, tree=False)
    names = ("key_cache", "value_cache", "block_table_BP", "prefix_lens_B")
    inputs = {name: value for name, value in inputs.items() if name not in names}
    out, lse = prefix.to(case.dtype), lse.float()
    settings = case.settings | arguments
    return finish_tree_attention(**inputs, out_THD=out, lse_HT=lse, impl=impl, **settings)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("attend", [paged, split, finish])
class TestAll:
    @pytest.mark.parametrize("query", [False, True])
    @pytest.mark.parametrize("on_device", [False, True])
    def test_equals_attention_to_what_the_cache_holds(self, attend, impl, query, on_device):
        case, inputs = cached(make(), query)
        case.assert_right(attend(case, inputs, impl, **scales(query, on_device)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_types(self, attend, impl, dtype):
        case, inputs = cached(make(dtype, head_dim=64, heads=8))
        case.assert_right(attend(case, inputs, impl, **scales(False, True)))

    def test_softcap(self, attend, impl):
        case, inputs = cached(make(softcap=2.0), query=True)
        case.assert_right(attend(case, inputs, impl, **scales(True, False)))


@pytest.mark.parametrize("impl", IMPLS)
def test_uint8_is_the_same_cache(impl):
    case, inputs = cached(make(window=30))
    expected = paged(case, inputs, impl, **scales(False, True))
    case.assert_right(expected)
    for name in ("key_cache", "value_cache"):
        inputs[name] = inputs[name].view(torch.uint8)
    assert torch.equal(paged(case, inputs, impl, **scales(False, True)), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_nodes_round_as_the_cache_does(impl):
    """Every value of e4m3, all ties between two of them, subnormals, and what overflows."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([ties * (1 + 2**-20), ties * (1 - 2**-20)])
    values = torch.cat([codes, ties, near, torch.tensor([448.0, 463.0, 465.0, 1e6])])
    values = torch.cat([values, -values, values.new_zeros(-2 * len(values) % 64)])
    rows = values.view(-1, 1, 64).to(DEVICE)
    rows = torch.cat([rows, rows.new_zeros(64 - len(rows), 1, 64)])[:64]
    # Each row sees its own node alone: the output is that node's value.
    case = Attention([0], [[1 << row if row < 63 else -(1 << 63) for row in range(64)]])
    inputs = case.inputs | {
        "query_THD": torch.zeros(64, 1, 64, device=DEVICE),
        "tree_key_SHD": rows,
        "tree_value_SHD": rows,
        "key_cache": torch.zeros(1, 16, 1, 64, device=DEVICE).to(E4M3),
        "value_cache": torch.zeros(1, 16, 1, 64, device=DEVICE).to(E4M3),
    }
    out = torch.full_like(rows, NAN)
    tree_attention(
        **inputs, out_THD=out, impl=impl, k_scale=1.0, v_scale=0.5, **(case.settings | {"scale": 1})
    )
    assert torch.equal(out, quantised(rows, 0.5).float() * 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_scale": None}, "k_scale and v_scale"),
        ({"k_scale": None, "v_scale": None}, "give k_scale and v_scale"),
        ({"k_scale": torch.ones(1, device=DEVICE)}, "as floats or all as tensors"),
        (scales(False, True) | {"k_scale": torch.ones(2, device=DEVICE)}, "one element"),
        ({"q_scale": 0.5}, "q_scale belongs to an e4m3 query"),
    ],
)
def test_scales_that_do_not_fit_are_named(change, message):
    case, inputs = cached(make())
    with pytest.raises(ValueError, match=message):
        paged(case, inputs, "torch", **(scales(False, False) | change))


def test_an_e4m3_query_needs_its_scale():
    case, inputs = cached(make(), query=True)
    with pytest.raises(ValueError, match="q_scale belongs"):
        paged(case, inputs, "torch", **scales(False, False))
