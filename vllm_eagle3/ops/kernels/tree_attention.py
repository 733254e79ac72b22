"""See :func:`vllm_eagle3.ops.tree_attention`."""

import torch
import triton
import triton.language as tl

from vllm_eagle3.ops.kernels.softmax import (
    attend_tree,
    popcount,
    scale_scores,
    update_softmax,
)
from vllm_eagle3.ops.kernels.tiling import keys_per_step, score_scales, tile_grid, tile_sizes


@triton.jit
def _tree_attention_kernel(
    query_ptr,  # [T, query heads, D]
    tree_key_ptr,  # [S, kv heads, D]
    tree_value_ptr,  # [S, kv heads, D]
    key_cache_ptr,  # [blocks, PAGE, kv heads, D]
    value_cache_ptr,  # [blocks, PAGE, kv heads, D]
    block_table_ptr,  # [B, pages]
    prefix_lens_ptr,  # [B]
    query_start_loc_ptr,  # [B + 1]
    tree_start_ptr,  # [B]
    tree_lens_ptr,  # [B]
    ancestor_bits_ptr,  # [T]
    out_ptr,  # [T, query heads, D]
    query_stride_t,
    query_stride_h,
    tree_key_stride_s,
    tree_key_stride_h,
    tree_value_stride_s,
    tree_value_stride_h,
    key_cache_stride_b,
    key_cache_stride_n,
    key_cache_stride_h,
    value_cache_stride_b,
    value_cache_stride_n,
    value_cache_stride_h,
    block_table_stride,
    out_stride_t,
    out_stride_h,
    inner_scale,
    outer_scale,
    window,
    GROUP: tl.constexpr,  # query heads of one kv head
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
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

    member = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = start + member // GROUP
    head = kv_head * GROUP + member % GROUP
    in_request = member < num_rows * GROUP
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < HEAD_DIM
    in_tile = in_request[:, None] & in_head[None, :]
    query_at = row.to(tl.int64) * query_stride_t + head * query_stride_h
    query = tl.load(query_ptr + query_at[:, None] + dim[None, :], mask=in_tile, other=0.0).to(DOT)
    bits = tl.load(ancestor_bits_ptr + row, mask=in_request, other=0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    prefix_len = tl.load(prefix_lens_ptr + request)
    first_position = 0
    if HAS_WINDOW:
        row_position = prefix_len + popcount(bits) - 1
        # The root sees furthest back; whole blocks before that are hidden from all rows.
        first_position = tl.maximum(prefix_len - window, 0) // BLOCK_N * BLOCK_N
    key_cache_ptr += kv_head * key_cache_stride_h
    value_cache_ptr += kv_head * value_cache_stride_h
    block_table_ptr += request.to(tl.int64) * block_table_stride
    for first in range(first_position, prefix_len, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        in_prefix = position < prefix_len
        if HAS_WINDOW:
            # Pages before every row's window may have been freed and hold another request's.
            in_prefix = in_prefix & (position >= prefix_len - window)
        page = tl.load(block_table_ptr + position // PAGE, mask=in_prefix, other=0).to(tl.int64)
        key_at = page * key_cache_stride_b + position % PAGE * key_cache_stride_n
        value_at = page * value_cache_stride_b + position % PAGE * value_cache_stride_n
        # Rows past the prefix may hold anything, NaN too, which no weight of 0 would hide.
        key = tl.load(
            key_cache_ptr + key_at[None, :] + dim[:, None],
            mask=in_prefix[None, :] & in_head[:, None],
            other=0.0,
        )
        value = tl.load(
            value_cache_ptr + value_at[:, None] + dim[None, :],
            mask=in_prefix[:, None] & in_head[None, :],
            other=0.0,
        )
        visible = in_request[:, None] & in_prefix[None, :]
        if HAS_WINDOW:
            visible = visible & (position[None, :] > row_position[:, None] - window)
        scores = tl.dot(query, key.to(DOT), input_precision=PRECISION)
        scores = scale_scores(scores, inner_scale, outer_scale, HAS_SOFTCAP)
        scores = tl.where(visible, scores, float("-inf"))
        acc, peak, total = update_softmax(acc, peak, total, scores, value, DOT, PRECISION)

    tree_row = tl.load(tree_start_ptr + request).to(tl.int64)
    acc, peak, total = attend_tree(
        query,
        bits,
        acc,
        peak,
        total,
        tree_key_ptr + tree_row * tree_key_stride_s + kv_head * tree_key_stride_h,
        tree_value_ptr + tree_row * tree_value_stride_s + kv_head * tree_value_stride_h,
        tree_key_stride_s,
        tree_value_stride_s,
        tl.load(tree_lens_ptr + request),
        inner_scale,
        outer_scale,
        window,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_S,
        HAS_SOFTCAP,
        HAS_WINDOW,
        DOT,
        PRECISION,
    )
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_at = row.to(tl.int64) * out_stride_t + head * out_stride_h
    out_ptrs = out_ptr + out_at[:, None] + dim[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_tile)


def launch(
    query_THD: torch.Tensor,
    tree_key_SHD: torch.Tensor,
    tree_value_SHD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table_BP: torch.Tensor,
    prefix_lens_B: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    tree_start_B: torch.Tensor,
    tree_lens_B: torch.Tensor,
    ancestor_bits_T: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    max_tree_len: int,
    softcap: float,
    sliding_window: int | None,
) -> None:
    """One program for each tile of rows, kv head and request."""
    sizes = tile_sizes(query_THD, tree_key_SHD, max_query_len, max_tree_len)
    inner_scale, outer_scale = score_scales(scale, softcap)
    _tree_attention_kernel[tile_grid(query_start_loc_B1, tree_key_SHD, max_query_len, sizes)](
        query_THD,
        tree_key_SHD,
        tree_value_SHD,
        key_cache,
        value_cache,
        block_table_BP,
        prefix_lens_B,
        query_start_loc_B1,
        tree_start_B,
        tree_lens_B,
        ancestor_bits_T,
        out_THD,
        *query_THD.stride()[:2],
        *tree_key_SHD.stride()[:2],
        *tree_value_SHD.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table_BP.stride(0),
        *out_THD.stride()[:2],
        inner_scale,
        outer_scale,
        0 if sliding_window is None else sliding_window,
        PAGE=key_cache.shape[1],
        BLOCK_N=keys_per_step(query_THD),
        HAS_SOFTCAP=softcap > 0.0,
        HAS_WINDOW=sliding_window is not None,
        **sizes,
    )
