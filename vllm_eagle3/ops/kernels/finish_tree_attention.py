"""See :func:`vllm_eagle3.ops.finish_tree_attention`."""

import torch
import triton
import triton.language as tl

from vllm_eagle3.ops.kernels.softmax import attend_tree
from vllm_eagle3.ops.kernels.tiling import score_scales, tile_grid, tile_sizes


@triton.jit
def _finish_tree_attention_kernel(
    query_ptr,  # [T, query heads, D]
    tree_key_ptr,  # [S, kv heads, D]
    tree_value_ptr,  # [S, kv heads, D]
    out_ptr,  # [T, query heads, D], in and out
    lse_ptr,  # [query heads, T]
    query_start_loc_ptr,  # [B + 1]
    tree_start_ptr,  # [B]
    tree_lens_ptr,  # [B]
    ancestor_bits_ptr,  # [T]
    query_stride_t,
    query_stride_h,
    tree_key_stride_s,
    tree_key_stride_h,
    tree_value_stride_s,
    tree_value_stride_h,
    out_stride_t,
    out_stride_h,
    lse_stride_h,
    lse_stride_t,
    inner_scale,
    outer_scale,
    GROUP: tl.constexpr,  # query heads of one kv head
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
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

    # The prefix is one block of keys that the softmax has already seen: its output with
    # weight 1, at the height of its log-sum.
    lse_at = head.to(tl.int64) * lse_stride_h + row * lse_stride_t
    lse = tl.load(lse_ptr + lse_at, mask=in_request, other=float("-inf"))
    has_prefix = (lse > float("-inf")) & (lse < float("inf"))
    out_at = row.to(tl.int64) * out_stride_t + head * out_stride_h
    out_ptrs = out_ptr + out_at[:, None] + dim[None, :]
    acc = tl.load(out_ptrs, mask=in_tile & has_prefix[:, None], other=0.0).to(tl.float32)
    peak = tl.where(has_prefix, lse * 1.4426950408889634, float("-inf"))
    total = tl.where(has_prefix, 1.0, 0.0)

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
        0,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_S,
        HAS_SOFTCAP,
        False,
        DOT,
        PRECISION,
    )
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_tile)


def launch(
    query_THD: torch.Tensor,
    tree_key_SHD: torch.Tensor,
    tree_value_SHD: torch.Tensor,
    out_THD: torch.Tensor,
    lse_HT: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    tree_start_B: torch.Tensor,
    tree_lens_B: torch.Tensor,
    ancestor_bits_T: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    max_tree_len: int,
    softcap: float,
) -> None:
    """One program for each tile of rows, kv head and request."""
    sizes = tile_sizes(query_THD, tree_key_SHD, max_query_len, max_tree_len)
    inner_scale, outer_scale = score_scales(scale, softcap)
    _finish_tree_attention_kernel[
        tile_grid(query_start_loc_B1, tree_key_SHD, max_query_len, sizes)
    ](
        query_THD,
        tree_key_SHD,
        tree_value_SHD,
        out_THD,
        lse_HT,
        query_start_loc_B1,
        tree_start_B,
        tree_lens_B,
        ancestor_bits_T,
        *query_THD.stride()[:2],
        *tree_key_SHD.stride()[:2],
        *tree_value_SHD.stride()[:2],
        *out_THD.stride()[:2],
        *lse_HT.stride(),
        inner_scale,
        outer_scale,
        HAS_SOFTCAP=softcap > 0.0,
        **sizes,
    )
