"""Prefixes split over programs, and the levels of a draft in scratch buffers."""

import pytest
import torch

from tests.ops.setups import (
    DEVICE,
    IMPLS,
    NAN,
    Attention,
    ancestors,
    random_parents,
    trees,
    word,
)
from vllm_eagle3.ops import finish_tree_attention, tree_attention
from vllm_eagle3.ops.kernels import tiling

PREFIX_ARGUMENTS = ("key_cache", "value_cache", "block_table_BP", "prefix_lens_B")


def run(case: Attention, num_splits: int | None, **arguments) -> torch.Tensor:
    out = torch.full_like(case.inputs["query_THD"], NAN)
    tree_attention(
        **(case.inputs | {"out_THD": out, "impl": "triton"} | case.settings | arguments),
        sliding_window=case.window,
        num_splits=num_splits,
    )
    return out


@pytest.mark.parametrize("num_splits", [2, 3, 8])
def test_prefixes_of_all_lengths_in_one_launch(num_splits):
    """None, one key, one split, the last split short, padding, more keys than splits hold."""
    case = Attention([0, 1, 64, 65, 5, 150], [*trees(3, 2, 4, 1), [], *trees(2, seed=9)])
    case.assert_right(run(case, num_splits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_head_dims_and_types(head_dim, dtype):
    case = Attention([70, 140], trees(3, 5), head_dim=head_dim, dtype=dtype)
    case.assert_right(run(case, 3))


@pytest.mark.parametrize("window", [1, 40, 100])
def test_sliding_window(window):
    case = Attention([0, 30, 150], trees(6, 9, 6), window=window)
    freed = case.inputs["block_table_BP"][2, : max(0, 150 - window) // case.page].tolist()
    case.assert_right(run(case, 4))
    expected = run(case, 4)
    for cache in ("key_cache", "value_cache"):
        case.inputs[cache][freed] = NAN
    assert torch.equal(run(case, 4), expected)


def test_softcap_and_grouped_heads():
    case = Attention([100, 33], trees(7, 4), heads=12, kv_heads=2, softcap=2.0)
    case.assert_right(run(case, 4))


@pytest.mark.parametrize(("nodes", "dtype"), [(40, torch.float32), (64, torch.float16)])
def test_more_rows_than_a_tile_holds(nodes, dtype):
    case = Attention([70], trees(nodes), heads=4, kv_heads=1, dtype=dtype)
    case.assert_right(run(case, 2))


def test_the_bound_on_prefixes_is_no_bound_on_results():
    """A graph may be captured with prefixes shorter than those it will see."""
    case = Attention([300], trees(4))
    case.assert_right(run(case, None, max_prefix_len=0))
    case.assert_right(run(case, None))


def test_a_split_outweighs_the_others():
    case = Attention([130], trees(3))
    page = int(case.inputs["block_table_BP"][0, 2])
    case.inputs["key_cache"][page].mul_(20.0)
    case.assert_right(run(case, 4))


def test_num_splits_must_be_positive():
    case = Attention([4], trees(2))
    with pytest.raises(ValueError, match="num_splits"):
        run(case, 0)


@pytest.mark.parametrize("rows", [1, 8, 33, 64])
@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("context", [0, 100, 2048, 131072])
def test_splits_fill_a_gpu_and_spare_its_memory(monkeypatch, rows, batch, context):
    """32/8 heads of 128 on the 132 multiprocessors of an H200."""
    monkeypatch.setattr(tiling, "num_sms", lambda device: 132)
    out = torch.empty(batch * rows, 32, 128, dtype=torch.bfloat16)
    sizes = tiling.tile_sizes(out, out[:, :8], rows, rows)
    splits = tiling.split_prefixes(out, sizes, rows, batch, 8, context, None).num_splits
    programs = splits * -(-rows * 4 // sizes["BLOCK_M"]) * 8 * batch
    assert programs >= 0.9 * 132 or splits == max(1, context // 128)
    # Either a small share of memory, or no more than two programs for each multiprocessor.
    assert splits * out.numel() * 4 <= 64 << 20 or programs <= 264 or splits == 1
    if context >= 131072 and batch * rows <= 64:
        assert context / splits <= 4096, "one long prefix must not keep all others waiting"


def attend_paged(case, impl, **arguments) -> torch.Tensor:
    out = torch.full_like(case.inputs["query_THD"], NAN)
    tree_attention(**case.inputs, out_THD=out, impl=impl, **case.settings, **arguments)
    return out


def attend_split(case, impl, **arguments) -> torch.Tensor:
    return attend_paged(case, impl, num_splits=3, **arguments)


def attend_finish(case, impl, **arguments) -> torch.Tensor:
    prefix, lse = case.by_the_book(torch.float64, tree=False)
    out = prefix.to(case.dtype)
    inputs = {name: value for name, value in case.inputs.items() if name not in PREFIX_ARGUMENTS}
    finish_tree_attention(
        **inputs, out_THD=out, lse_HT=lse.float(), impl=impl, **case.settings, **arguments
    )
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("attend", [attend_paged, attend_split, attend_finish])
def test_levels_of_a_draft_gather_in_scratch(attend, impl):
    """Each level gives its own rows only; those of earlier levels come from the buffers."""
    level_rows, levels, lens, padding = 3, 4, [40, 0], [False, False, True]
    keys = torch.full((3 * 20, 2, 32), NAN, device=DEVICE)
    scratch = keys, keys.clone()
    parents = [random_parents(b, level_rows * levels) for b in range(2)]
    for level in range(1, levels + 1):
        nodes = range(level_rows * (level - 1), level_rows * level)
        seen = [[word(ancestors(tree, node)) for node in nodes] for tree in parents]
        count = [0 if pad else level_rows * level for pad in padding]
        # The reference has all levels' rows in one buffer; a new level gets new random rows.
        case = Attention([*lens, 7], [*seen, []], tree_keys=count, seed=level)
        whole_key, whole_value = case.inputs["tree_key_SHD"], case.inputs["tree_value_SHD"]
        for b in range(2):
            known = slice(20 * b, 20 * b + level_rows * (level - 1))
            whole_key[64 * b : 64 * b + level_rows * (level - 1)] = scratch[0][known]
            whole_value[64 * b : 64 * b + level_rows * (level - 1)] = scratch[1][known]
        fresh = [64 * b + node for b in range(2) for node in nodes]
        expected = attend_paged(case, "torch")
        starts = case.inputs["tree_start_B"].clone()
        case.inputs["tree_key_SHD"] = whole_key[fresh].contiguous()
        case.inputs["tree_value_SHD"] = whole_value[fresh].contiguous()
        case.inputs["tree_start_B"] = starts // 64 * 20
        found = attend(case, impl, scratch=scratch)
        assert (found - expected).abs().max() <= 5e-6
        for b in range(2):
            stored = slice(20 * b, 20 * b + level_rows * level)
            whole = slice(64 * b, 64 * b + level_rows * level)
            assert torch.equal(scratch[0][stored], whole_key[whole])
            assert torch.equal(scratch[1][stored], whole_value[whole])
    untouched = [20 * b + row for b in range(2) for row in range(12, 20)] + list(range(40, 60))
    assert scratch[0][untouched].isnan().all()


def test_scratch_of_another_shape_is_refused():
    case = Attention([4], trees(2))
    keys = torch.zeros(8, 1, 32, device=DEVICE)
    with pytest.raises(ValueError, match="scratch"):
        attend_paged(case, "torch", scratch=(keys, keys))
    wide = torch.zeros(8, 2, 64, device=DEVICE)[..., :32]
    with pytest.raises(ValueError, match="same strides"):
        attend_paged(case, "torch", scratch=(wide, wide.contiguous()))
