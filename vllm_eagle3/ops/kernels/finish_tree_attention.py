"""See :func:`vllm_eagle3.ops.finish_tree_attention`."""

import torch
import triton
import triton.language as tl

from vllm_eagle3.ops.kernels.arguments import scale_arguments, scratch_arguments
from vllm_eagle3.ops.kernels.nodes import attend_tree, store_level
from vllm_eagle3.ops.kernels.softmax import load_scales, split_of_prefix, tile_rows
from vllm_eagle3.ops.kernels.tiling import Splits, finish_sizes, keys_per_step, score_scales
from vllm_eagle3.ops.reference import Scales, Scratch


# Whatever follows the batch is not specialised: each value would compile the kernel anew.
@triton.jit(
    do_not_specialize=[
        "lse_stride_split",
        "lse_stride_h",
        "lse_stride_t",
        "window",
        "num_splits",
        "few_splits",
    ],
    do_not_specialize_on_alignment=[
        "lse_ptr",
        "prefix_lens_ptr",
        "query_start_loc_ptr",
        "tree_start_ptr",
        "tree_lens_ptr",
        "ancestor_bits_ptr",
    ],
)
def _finish_tree_attention_kernel(
    query_ptr,  # [T, query heads, D]
    tree_key_ptr,  # [S, kv heads, D]
    tree_value_ptr,  # [S, kv heads, D]
    scratch_key_ptr,  # [scratch rows, kv heads, D]
    scratch_value_ptr,
    part_ptr,  # [splits, T, query heads, D]; may be out_ptr
    lse_ptr,  # [splits, query heads, T]
    out_ptr,  # [T, query heads, D]
    prefix_lens_ptr,  # [B], if there are splits
    query_start_loc_ptr,  # [B + 1]
    tree_start_ptr,  # [B]
    tree_lens_ptr,  # [B]
    ancestor_bits_ptr,  # [T]
    query_scale,
    key_scale,
    value_scale,
    query_stride_t,
    query_stride_h,
    tree_key_stride_s,
    tree_key_stride_h,
    tree_value_stride_s,
    tree_value_stride_h,
    scratch_stride_s,
    scratch_stride_h,
    part_stride_split,
    part_stride_t,
    part_stride_h,
    lse_stride_split,
    lse_stride_h,
    lse_stride_t,
    out_stride_t,
    out_stride_h,
    inner_scale,
    outer_scale,
    window,
    num_splits,
    few_splits,
    GROUP: tl.constexpr,  # query heads of one kv head
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LEAST_KEYS: tl.constexpr,
    MOST_KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_SCRATCH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
    SCALES_ON_DEVICE: tl.constexpr,
    TYPE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.program_id(2)
    start = tl.load(query_start_loc_ptr + request)
    num_rows = tl.load(query_start_loc_ptr + request + 1) - start
    if tile * BLOCK_M >= num_rows * GROUP:
        return
    if SPLIT:
        prefix_len = tl.load(prefix_lens_ptr + request)
        _, _, used_splits = split_of_prefix(
            prefix_len, window, num_splits, few_splits, LEAST_KEYS, MOST_KEYS, BLOCK_N, HAS_WINDOW
        )
        if used_splits == 1:  # finished by the program that had the whole prefix
            return

    row, head, in_request = tile_rows(tile, kv_head, start, num_rows, GROUP, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < HEAD_DIM
    in_tile = in_request[:, None] & in_head[None, :]
    query_at = row.to(tl.int64) * query_stride_t + head * query_stride_h
    query = tl.load(query_ptr + query_at[:, None] + dim[None, :], mask=in_tile, other=0.0).to(DOT)
    bits = tl.load(ancestor_bits_ptr + row, mask=in_request, other=0)
    inner_scale, outer_scale, key_scale, value_scale = load_scales(
        inner_scale,
        outer_scale,
        query_scale,
        key_scale,
        value_scale,
        HAS_SOFTCAP,
        QUANTISED,
        SCALES_ON_DEVICE,
    )

    # A part of the prefix is one block of keys that the softmax has already seen: its output
    # with weight 1, at the height of its log-sum.
    part_at = row.to(tl.int64) * part_stride_t + head * part_stride_h
    part_ptrs = part_ptr + part_at[:, None] + dim[None, :]
    lse_ptrs = lse_ptr + head.to(tl.int64) * lse_stride_h + row * lse_stride_t
    if SPLIT:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        # Stages: a load takes longer than the sum, and no load depends on another.
        for _ in tl.range(0, used_splits, num_stages=4):
            part_lse = tl.load(lse_ptrs, mask=in_request, other=float("-inf"))
            part = tl.load(part_ptrs, mask=in_tile, other=0.0)
            lse_ptrs += lse_stride_split
            part_ptrs += part_stride_split
            part_peak = part_lse * 1.4426950408889634
            new_peak = tl.maximum(peak, part_peak)
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            decay = tl.exp2(peak - base)
            weight = tl.exp2(part_peak - base)
            acc = acc * decay[:, None] + part * weight[:, None]
            total = total * decay + weight
            peak = new_peak
    else:
        lse = tl.load(lse_ptrs, mask=in_request, other=float("-inf"))
        has_prefix = (lse > float("-inf")) & (lse < float("inf"))
        acc = tl.load(part_ptrs, mask=in_tile & has_prefix[:, None], other=0.0).to(tl.float32)
        if QUANTISED:
            acc = acc / value_scale
        peak = tl.where(has_prefix, lse * 1.4426950408889634, float("-inf"))
        total = tl.where(has_prefix, 1.0, 0.0)

    tree_row = tl.load(tree_start_ptr + request)
    tree_len = tl.load(tree_lens_ptr + request)
    tree_key_ptr += kv_head * tree_key_stride_h
    tree_value_ptr += kv_head * tree_value_stride_h
    if HAS_SCRATCH:
        scratch_key_ptr += kv_head * scratch_stride_h
        scratch_value_ptr += kv_head * scratch_stride_h
        if not SPLIT and tile == 0:  # with splits, those that read the prefix have stored it
            store_level(
                start,
                num_rows,
                tree_row,
                tree_len,
                tree_key_ptr,
                tree_value_ptr,
                tree_key_stride_s,
                tree_value_stride_s,
                scratch_key_ptr,
                scratch_value_ptr,
                scratch_stride_s,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_S,
            )
    acc, peak, total = attend_tree(
        query,
        bits,
        acc,
        peak,
        total,
        start,
        num_rows,
        tree_row,
        tree_len,
        tree_key_ptr,
        tree_value_ptr,
        tree_key_stride_s,
        tree_value_stride_s,
        scratch_key_ptr,
        scratch_value_ptr,
        scratch_stride_s,
        key_scale,
        value_scale,
        inner_scale,
        outer_scale,
        window,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_S,
        HAS_SCRATCH,
        HAS_SOFTCAP,
        HAS_WINDOW,
        QUANTISED,
        TYPE,
        DOT,
        PRECISION,
    )
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if QUANTISED:
        out *= value_scale
    out_at = row.to(tl.int64) * out_stride_t + head * out_stride_h
    out_ptrs = out_ptr + out_at[:, None] + dim[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_tile)


def launch(
    query_THD: torch.Tensor,
    tree_key_SHD: torch.Tensor,
    tree_value_SHD: torch.Tensor,
    part_XTHD: torch.Tensor,
    lse_XHT: torch.Tensor,
    out_THD: torch.Tensor,
    prefix_lens_B: torch.Tensor | None,
    query_start_loc_B1: torch.Tensor,
    tree_start_B: torch.Tensor,
    tree_lens_B: torch.Tensor,
    ancestor_bits_T: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    max_tree_len: int,
    softcap: float,
    scratch: Scratch | None,
    scales: Scales | None,
    sliding_window: int | None = None,
    splits: Splits | None = None,
) -> None:
    """One program for each tile of rows, kv head and request; X parts of each prefix."""
    num_kv_heads, batch = tree_key_SHD.shape[1], query_start_loc_B1.shape[0] - 1
    sizes = finish_sizes(out_THD, tree_key_SHD, max_query_len, max_tree_len, batch)
    tiles = triton.cdiv(max_query_len * sizes["GROUP"], sizes["BLOCK_M"])
    inner_scale, outer_scale = score_scales(scale, softcap)
    scratch_tensors, scratch_strides = scratch_arguments(scratch)
    scale_values, scale_constants = scale_arguments(scales)
    _finish_tree_attention_kernel[tiles, num_kv_heads, batch](
        query_THD,
        tree_key_SHD,
        tree_value_SHD,
        *scratch_tensors,
        part_XTHD,
        lse_XHT,
        out_THD,
        prefix_lens_B,
        query_start_loc_B1,
        tree_start_B,
        tree_lens_B,
        ancestor_bits_T,
        *scale_values,
        *query_THD.stride()[:2],
        *tree_key_SHD.stride()[:2],
        *tree_value_SHD.stride()[:2],
        *scratch_strides,
        *part_XTHD.stride()[:3],
        *lse_XHT.stride(),
        *out_THD.stride()[:2],
        inner_scale,
        outer_scale,
        0 if sliding_window is None else sliding_window,
        splits.num_splits if splits else 1,
        splits.few_splits if splits else 1,
        BLOCK_N=keys_per_step(out_THD),
        LEAST_KEYS=splits.least_keys if splits else 0,
        MOST_KEYS=splits.most_keys if splits else 0,
        SPLIT=splits is not None,
        HAS_SCRATCH=scratch is not None,
        HAS_SOFTCAP=softcap > 0.0,
        HAS_WINDOW=sliding_window is not None,
        **scale_constants,
        **sizes,
    )
