"""Tree attention on FlashAttention 3: its plans, its arguments, and what comes out.

Without a Hopper GPU :mod:`tests.engine.flash3` stands in for the kernel, and a graph is a call
with what was captured; layers, builders and the tree part are real.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch

from tests.engine.engines import tree
from tests.engine.flash3 import IS_HOPPER, Flash3, StandIn
from tests.engine.layers import GPU, MAX_MODEL_LEN, Layer, common
from tests.ops.setups import DEVICE, NAN, Attention, ancestors, int32, random_parents, word, words
from vllm_eagle3.engine import contract, support

pytestmark = [pytest.mark.gpu] if IS_HOPPER else []
# The kernel has no float32, in which the stand-in is exact.
DTYPES = [torch.bfloat16] if IS_HOPPER else [torch.float32, torch.bfloat16]


@pytest.fixture
def flash3(monkeypatch: Any) -> Flash3:
    monkeypatch.setattr(support, "current_platform", GPU)
    return Flash3(monkeypatch)


@pytest.fixture(scope="module")
def vllm_config(pair: Any) -> Any:
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(pair.target),
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=9,
        speculative_config=tree(pair, 12, depth=3, top_k=4),
    ).create_engine_config()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.max_cudagraph_capture_size = 16
    return config


def verify(layer: Layer, vllm_config: Any) -> torch.Tensor:
    layer.batch.rows = rows = layer.rows()
    return layer.forward(layer.builder(vllm_config).build(0, common(layer, rows)))


def assert_right(layer: Layer, out: torch.Tensor, case: Attention | None = None) -> None:
    case = case or layer.case
    if not (IS_HOPPER and layer.is_e4m3):
        case.assert_right(out)
        return
    # The kernel rounds the weights to e4m3 as well: three bits.
    exact = case.by_the_book(torch.float64)[0]
    assert (out.double() - exact).abs().max() <= 2**-4 * exact.abs().max()


def recorded(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """What replays ``forward``."""
    if not IS_HOPPER:
        return forward
    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def trees(*sizes: int, seed: int = 0) -> list[list[int]]:
    return [words(random_parents(seed + b, size)) for b, size in enumerate(sizes)]


def make(dtype: torch.dtype = DTYPES[0], **settings: Any) -> Attention:
    return Attention([0, 70, 19], trees(4, 5, 3), dtype=dtype, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_e4m3", [False, True], ids=["same type", "e4m3"])
class TestLayer:
    @pytest.mark.parametrize("softcap", [0.0, 2.0])
    def test_verification(self, flash3, vllm_config, dtype, is_e4m3, softcap):
        layer = Layer(make(dtype, softcap=softcap), is_e4m3)
        assert_right(layer, verify(layer, vllm_config))
        assert (flash3.num_plans, flash3.num_calls) == (1, 1)

    @pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 64), (9, 3, 80)])
    def test_shapes(self, flash3, vllm_config, dtype, is_e4m3, heads, kv_heads, head_dim):
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page": 32}
        layer = Layer(make(dtype, **shape), is_e4m3)
        assert_right(layer, verify(layer, vllm_config))

    @pytest.mark.parametrize("softcap", [0.0, 2.0])
    def test_a_level_of_the_draft(self, flash3, vllm_config, dtype, is_e4m3, softcap):
        """K rows each, whose keys the layer adds to those of the earlier levels."""
        frontier = [word(ancestors(random_parents(3, 12), node)) for node in range(8, 12)]
        case = Attention(
            [33, 0, 7], [frontier] * 3, tree_keys=[12] * 3, dtype=dtype, softcap=softcap
        )
        layer = Layer(case, is_e4m3)
        places = [64 * b + node for b in range(3) for node in range(8, 12)]
        names = ("tree_key_SHD", "tree_value_SHD")
        scratch = tuple(layer.inputs[name].clone() for name in names)
        own = {name: rows[places] for name, rows in zip(names, scratch, strict=True)}
        for rows in scratch:
            rows[places] = NAN
        rows = layer.rows(scratch=scratch, max_prefix_len=MAX_MODEL_LEN)
        builder = layer.builder(vllm_config)
        metadata = builder.build_tree_rows(rows, layer.inputs["block_table_BP"])
        assert_right(layer, layer.forward(metadata, **own))
        for name, rows in zip(names, scratch, strict=True):
            assert torch.equal(rows[places], own[name])
        assert flash3.num_calls == 1

    def test_a_graph_replays_other_prefixes(self, flash3, vllm_config, dtype, is_e4m3):
        """Host integers and addresses are those of the capture, a batch of padded size."""
        seen = trees(5, 5, 5)
        layer = Layer(Attention([1, 1, 1], seen, dtype=dtype), is_e4m3)
        builder = layer.builder(vllm_config)
        at = {name: x.clone() for name, x in layer.inputs.items()}
        at["prefix_lens_B"].zero_()
        at["block_table_BP"] = torch.zeros(3, 9, dtype=torch.int32, device=DEVICE)
        layer.inputs = at
        layer.cache = layer.cache.new_zeros(20, *layer.cache.shape[1:])
        layer.batch.rows = layer.rows(max_prefix_len=0)
        captured = builder.build_for_cudagraph_capture(common(layer, layer.batch.rows))
        replay = recorded(lambda: layer.forward(captured))
        for lens in ([70, 0, 19], [8, 120, 0], [MAX_MODEL_LEN // 4, 1, 0]):
            size = 3 if lens[2] else 2  # the last request may be padding
            case = Attention(lens, [*seen[:size], [], []][:3], dtype=dtype, seed=lens[0])
            step = Layer(case, is_e4m3)
            rows = size * 5
            at["query_start_loc_B1"].copy_(step.inputs["query_start_loc_B1"])
            at["tree_start_B"].copy_(step.inputs["tree_start_B"])
            at["tree_lens_B"].copy_(step.inputs["tree_lens_B"])
            at["prefix_lens_B"][:size] = int32(lens[:size])  # a padded one's is an older one
            table = step.inputs["block_table_BP"]
            at["block_table_BP"][:, : table.shape[1]] = table
            for name in ("query_THD", "tree_key_SHD", "tree_value_SHD", "ancestor_bits_T"):
                at[name][:rows] = step.inputs[name]
            layer.cache[: len(step.cache)] = step.cache
            layer.batch.rows = layer.rows(max_prefix_len=max(lens))
            builder.build(0, common(layer, layer.batch.rows))
            assert_right(layer, replay()[:rows], case)

    def test_prompts_behind_the_trees(self, flash3, vllm_config, dtype, is_e4m3):
        """The stock implementation attends for them, by a plan of its own, to the cache."""
        prompts = [words([-1, 0, 1, 2, 3, 4]), words([-1])]
        case = Attention([33, 9, 19, 39], [*trees(4, 3), *prompts], dtype=dtype)
        layer = Layer(case, is_e4m3)
        layer.write(request=2)
        layer.write(request=3)
        trees_only = {"num_reqs": 2, "num_tokens": 7, "max_query_len": 4, "max_tree_len": 4}
        rows = layer.rows(**trees_only, max_prefix_len=33)
        rows.query_start_loc = rows.query_start_loc[:3]
        for name in ("prefix_lens", "tree_start", "tree_lens"):
            setattr(rows, name, getattr(rows, name)[:2])
        batch = common(layer, layer.rows())
        layer.batch.rows = rows
        assert_right(layer, layer.forward(layer.builder(vllm_config).build(0, batch)))
        assert (flash3.num_plans, flash3.num_calls) == (2, 2)


@pytest.mark.parametrize("is_e4m3", [False, True], ids=["same type", "e4m3"])
@pytest.mark.parametrize(("window", "version"), [(30, 3), (None, 2), (None, 4)])
def test_the_portable_kernel_serves_windows_and_other_versions(
    flash3, vllm_config, is_e4m3, window, version
):
    layer = Layer(make(window=window), is_e4m3, version=version)
    layer.case.assert_right(verify(layer, vllm_config))
    assert (flash3.num_plans, flash3.num_calls) == (0, 0)


def test_a_group_of_layers_with_and_without_windows(flash3, vllm_config):
    windowed, layer = Layer(make(window=30)), Layer(make())
    layer.batch.rows = rows = layer.rows()
    metadata = layer.builder(vllm_config, windowed).build(0, common(layer, rows))
    windowed.case.assert_right(windowed.forward(metadata))
    layer.case.assert_right(layer.forward(metadata))
    assert flash3.num_calls == 1


def test_a_shorter_plan_leaves_nothing_of_a_longer_one(flash3, vllm_config):
    layer = Layer(Attention([9] * 9, trees(*[3] * 9), dtype=DTYPES[0]))
    builder = layer.builder(vllm_config)
    layer.batch.rows = layer.rows()
    builder.build(0, common(layer, layer.batch.rows))
    few = Layer(make())
    layer.batch.rows = few.rows()
    few.case.assert_right(few.forward(builder.build(0, common(few, layer.batch.rows))))


@pytest.mark.parametrize("num_reqs", [1, 9])
def test_splits_follow_the_shape_of_the_batch_alone(flash3, vllm_config, num_reqs):
    """A graph keeps the number that it was captured with."""
    found = set()
    for prefix_len in (0, 1, 500):
        layer = Layer(Attention([prefix_len] * num_reqs, trees(*[3] * num_reqs), dtype=DTYPES[0]))
        verify(layer, vllm_config)
        found.add(flash3.num_splits)
    (num_splits,) = found
    most = vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
    assert 1 < num_splits <= most


@pytest.mark.parametrize(("num_reqs", "most"), [(1, 4), (2, 2), (9, 1)])
def test_the_parts_of_a_step_take_little_memory(flash3, vllm_config, num_reqs, most):
    """64 nodes of 512 heads of 128: 16 MiB for each request and part, 64 MiB in all."""
    layer = Layer(make(heads=512, kv_heads=8, head_dim=128))
    rows = layer.rows(
        num_reqs=num_reqs,
        num_tokens=64 * num_reqs,
        query_start_loc=int32([64 * b for b in range(num_reqs + 1)]),
        prefix_lens=int32([500] * num_reqs),
        max_query_len=64,
    )
    metadata = layer.builder(vllm_config).build_tree_rows(rows, layer.inputs["block_table_BP"])
    assert metadata.schedule.num_splits == most


@pytest.mark.skipif(IS_HOPPER, reason="the kernel would take them")
class TestWrongArguments:
    """The stand-in sees what would be wrong on a GPU."""

    @pytest.mark.parametrize(
        "change",
        [
            {"qkv_dtype": torch.bfloat16},
            {"page_size": 32},
            {"max_seqlen_q": 9},
            {"has_softcap": True},
            {"causal": True},
            {"num_splits": 0},
            {"num_heads_kv": 4},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_a_plan_for_another_kernel(self, flash3, vllm_config, monkeypatch, change):
        from vllm_eagle3.engine import attention_flash

        monkeypatch.setattr(
            attention_flash,
            "get_scheduler_metadata",
            lambda **arguments: StandIn.get_scheduler_metadata(**{**arguments, **change}),
        )
        with pytest.raises(AssertionError, match="another kernel"):
            verify(Layer(make(), is_e4m3=True), vllm_config)

    @pytest.mark.parametrize("scale", ["_q_scale", "_k_scale", "_v_scale"])
    def test_a_scale_that_is_not_the_caches(self, flash3, vllm_config, scale):
        layer = Layer(make(), is_e4m3=True)
        getattr(layer, scale).mul_(1.1)
        with pytest.raises(AssertionError):
            layer.case.assert_right(verify(layer, vllm_config))

    def test_a_cache_of_bytes(self, flash3, vllm_config):
        layer = Layer(make(), is_e4m3=True)
        layer.impl.kv_cache_dtype = "auto"
        with pytest.raises(AssertionError):
            verify(layer, vllm_config)


@pytest.mark.parametrize("minor", contract.SUPPORTED)
@pytest.mark.parametrize("name", ["get_scheduler_metadata", "flash_attn_varlen_func"])
def test_the_stand_in_takes_what_vllm_takes(minor, name):
    shape = contract.read_record(f"{minor}.0")[f"vllm.v1.attention.backends.fa_utils:{name}"]
    parameters = shape.removeprefix("function (").removesuffix(")").split(", ")
    known = {parameter.partition("=")[0] for parameter in parameters}
    assert set(signature(getattr(StandIn, name)).parameters) <= known
