"""See :func:`vllm_eagle3.ops.tree_attention`."""

import torch
import triton

from vllm_eagle3.ops.kernels import finish_tree_attention
from vllm_eagle3.ops.kernels.arguments import scale_arguments, scratch_arguments
from vllm_eagle3.ops.kernels.prefix_attention import prefix_attention_kernel
from vllm_eagle3.ops.kernels.tiling import (
    keys_per_step,
    score_scales,
    split_prefixes,
    tile_sizes,
)
from vllm_eagle3.ops.reference import Scales, Scratch


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
    max_prefix_len: int,
    softcap: float,
    sliding_window: int | None,
    scratch: Scratch | None,
    scales: Scales | None,
    num_splits: int | None,
) -> None:
    """One program for each tile of rows, split of the prefix, kv head and request.

    Splits (FlashDecoding) share a long prefix; the kernel that finishes FlashAttention's output
    then merges their parts.
    """
    num_rows, num_heads, head_dim = query_THD.shape
    num_kv_heads, batch = tree_key_SHD.shape[1], query_start_loc_B1.shape[0] - 1
    sizes = tile_sizes(out_THD, tree_key_SHD, max_query_len, max_tree_len)
    if sliding_window is not None:
        max_prefix_len = min(max_prefix_len, sliding_window)
    splits = split_prefixes(
        out_THD, sizes, max_query_len, batch, num_kv_heads, max_prefix_len, num_splits
    )
    part = part_lse = None
    if splits.num_splits > 1:
        shape = (splits.num_splits, num_rows, num_heads, head_dim)
        part = torch.empty(shape, dtype=torch.float32, device=out_THD.device)
        part_lse = part.new_empty(splits.num_splits, num_heads, num_rows)
    tiles = triton.cdiv(max_query_len * sizes["GROUP"], sizes["BLOCK_M"])
    inner_scale, outer_scale = score_scales(scale, softcap)
    scratch_tensors, scratch_strides = scratch_arguments(scratch)
    scale_values, scale_constants = scale_arguments(scales)
    prefix_attention_kernel[tiles * splits.num_splits, num_kv_heads, batch](
        query_THD,
        tree_key_SHD,
        tree_value_SHD,
        *scratch_tensors,
        key_cache,
        value_cache,
        block_table_BP,
        prefix_lens_B,
        query_start_loc_B1,
        tree_start_B,
        tree_lens_B,
        ancestor_bits_T,
        out_THD,
        part,
        part_lse,
        *scale_values,
        *query_THD.stride()[:2],
        *tree_key_SHD.stride()[:2],
        *tree_value_SHD.stride()[:2],
        *scratch_strides,
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table_BP.stride(0),
        *out_THD.stride()[:2],
        num_rows,
        inner_scale,
        outer_scale,
        0 if sliding_window is None else sliding_window,
        tiles,
        splits.num_splits,
        splits.few_splits,
        PAGE=key_cache.shape[1],
        BLOCK_N=keys_per_step(out_THD),
        LEAST_KEYS=splits.least_keys,
        MOST_KEYS=splits.most_keys,
        SPLIT=splits.num_splits > 1,
        HAS_SCRATCH=scratch is not None,
        HAS_SOFTCAP=softcap > 0.0,
        HAS_WINDOW=sliding_window is not None,
        **scale_constants,
        **sizes,
    )
    if splits.num_splits > 1:
        finish_tree_attention.launch(
            query_THD,
            tree_key_SHD,
            tree_value_SHD,
            part,
            part_lse,
            out_THD,
            prefix_lens_B,
            query_start_loc_B1,
            tree_start_B,
            tree_lens_B,
            ancestor_bits_T,
            scale=scale,
            max_query_len=max_query_len,
            max_tree_len=max_tree_len,
            softcap=softcap,
            sliding_window=sliding_window,
            scratch=scratch,
            scales=scales,
            splits=splits,
        )
