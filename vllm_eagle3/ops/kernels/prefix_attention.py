"""The walk over the prefix, of :func:`vllm_eagle3.ops.tree_attention`.

A program that has a whole prefix goes on to the tree and is done. One that has a split
leaves a normalised part of the output, and its log-sum-exp, as FlashAttention would.
"""

import triton
import triton.language as tl

from vllm_eagle3.ops.kernels.nodes import attend_tree, store_level
from vllm_eagle3.ops.kernels.softmax import (
    attend_prefix,
    load_scales,
    split_of_prefix,
    tile_rows,
)


# Whatever follows the batch is not specialised: each value would compile the kernel anew.
@triton.jit(
    do_not_specialize=[
        "block_table_stride",
        "num_rows_of_parts",
        "window",
        "num_tiles",
        "num_splits",
        "few_splits",
    ],
    do_not_specialize_on_alignment=[
        "block_table_ptr",
        "prefix_lens_ptr",
        "query_start_loc_ptr",
        "tree_start_ptr",
        "tree_lens_ptr",
        "ancestor_bits_ptr",
    ],
)
def prefix_attention_kernel(
    query_ptr,  # [T, query heads, D]
    tree_key_ptr,  # [S, kv heads, D]
    tree_value_ptr,  # [S, kv heads, D]
    scratch_key_ptr,  # [scratch rows, kv heads, D]
    scratch_value_ptr,
    key_cache_ptr,  # [blocks, PAGE, kv heads, D]
    value_cache_ptr,  # [blocks, PAGE, kv heads, D]
    block_table_ptr,  # [B, pages]
    prefix_lens_ptr,  # [B]
    query_start_loc_ptr,  # [B + 1]
    tree_start_ptr,  # [B]
    tree_lens_ptr,  # [B]
    ancestor_bits_ptr,  # [T]
    out_ptr,  # [T, query heads, D]
    part_ptr,  # [splits, T, query heads, D] float32
    part_lse_ptr,  # [splits, query heads, T] float32
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
    key_cache_stride_b,
    key_cache_stride_n,
    key_cache_stride_h,
    value_cache_stride_b,
    value_cache_stride_n,
    value_cache_stride_h,
    block_table_stride,
    out_stride_t,
    out_stride_h,
    num_rows_of_parts,  # T
    inner_scale,
    outer_scale,
    window,
    num_tiles,
    num_splits,
    few_splits,
    GROUP: tl.constexpr,  # query heads of one kv head
    PAGE: tl.constexpr,
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
    # The tiles of one split run side by side: they read the same keys.
    tile = tl.program_id(0) % num_tiles
    split = tl.program_id(0) // num_tiles
    kv_head = tl.program_id(1)
    request = tl.program_id(2)
    start = tl.load(query_start_loc_ptr + request)
    num_rows = tl.load(query_start_loc_ptr + request + 1) - start
    prefix_len = tl.load(prefix_lens_ptr + request)
    first, split_keys, used_splits = split_of_prefix(
        prefix_len, window, num_splits, few_splits, LEAST_KEYS, MOST_KEYS, BLOCK_N, HAS_WINDOW
    )
    if (tile * BLOCK_M >= num_rows * GROUP) | (split >= used_splits):
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

    tree_row = tl.load(tree_start_ptr + request)
    tree_len = tl.load(tree_lens_ptr + request)
    tree_key_ptr += kv_head * tree_key_stride_h
    tree_value_ptr += kv_head * tree_value_stride_h
    if HAS_SCRATCH:
        scratch_key_ptr += kv_head * scratch_stride_h
        scratch_value_ptr += kv_head * scratch_stride_h
        if (tile == 0) & (split == 0):
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

    first += split * split_keys
    acc, peak, total = attend_prefix(
        query,
        bits,
        in_request,
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        first,
        tl.minimum(first + split_keys, prefix_len),
        prefix_len,
        key_cache_ptr + kv_head * key_cache_stride_h,
        value_cache_ptr + kv_head * value_cache_stride_h,
        block_table_ptr + request.to(tl.int64) * block_table_stride,
        key_cache_stride_b,
        key_cache_stride_n,
        value_cache_stride_b,
        value_cache_stride_n,
        inner_scale,
        outer_scale,
        window,
        PAGE,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_N,
        HAS_SOFTCAP,
        HAS_WINDOW,
        TYPE,
        DOT,
        PRECISION,
    )
    if SPLIT and used_splits > 1:
        part = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        num_heads = GROUP * tl.num_programs(1)
        part_row = (split.to(tl.int64) * num_rows_of_parts + row) * num_heads + head
        tl.store(part_ptr + part_row[:, None] * HEAD_DIM + dim[None, :], part, mask=in_tile)
        # -inf where there is no key.
        lse = (tl.log2(tl.where(total > 0.0, total, 1.0)) + peak) * 0.6931471805599453
        lse_row = (split.to(tl.int64) * num_heads + head) * num_rows_of_parts + row
        tl.store(part_lse_ptr + lse_row, lse, mask=in_request)
    if used_splits == 1:
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
