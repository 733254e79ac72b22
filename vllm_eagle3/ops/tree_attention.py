"""Attention of tree nodes to the committed prefix and to their own ancestors.

Shape suffixes beside those of :mod:`vllm_eagle3.tree.types`: T query rows, S rows of tree
keys, H heads, D head dimension, P pages of a block table.
"""

import torch

from vllm_eagle3.config import MAX_NODES
from vllm_eagle3.ops.dispatch import Impl, check, check_same_device, check_vector, resolve
from vllm_eagle3.ops.reference import finish_tree_attention_torch, tree_attention_torch

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD_DIM = 256


def tree_attention(
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
    softcap: float = 0.0,
    sliding_window: int | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Attend each query row to its request's whole prefix and to its ancestors in the tree.

    Row t of request b sees the cache's positions ``0 .. prefix_lens[b] - 1`` and the tree
    keys j whose bit is set in its word: row ``tree_start[b] + j`` of ``tree_key_SHD``.
    A row that sees nothing gets zeros. In the verification the tree keys are the step's own
    (``tree_start = query_start_loc``); in the draft's expansion they come from a scratch
    buffer that holds all expanded nodes.

    Lengths are read on the device; nothing waits for it, except in the torch implementation.
    Tree keys from ``tree_lens`` on, and cache rows past the prefix or before the windows of all
    rows, are never read.

    Args:
        query_THD: ``[T, query heads, D]``, bf16, fp16 or fp32; D at most 256, contiguous.
        tree_key_SHD, tree_value_SHD: ``[S, kv heads, D]`` of the query's type.
        key_cache, value_cache: ``[blocks, block size, kv heads, D]`` of the query's type,
            any strides, D contiguous.
        block_table_BP: int32 pages of each request.
        prefix_lens_B: int32 committed tokens in the cache; 0 is allowed.
        query_start_loc_B1: int32 first row of each request, and the end; a request without
            rows is padding.
        tree_start_B: int32 first row of each request's tree keys.
        tree_lens_B: int32 tree keys of each request, at most 64.
        ancestor_bits_T: int64 tree keys that each row sees; bit 63 is the sign.
        out_THD: written, as ``query_THD``; rows of no request are left alone.
        scale: of the scores, usually ``D ** -0.5``.
        max_query_len, max_tree_len: bounds on rows and tree keys of a request.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        sliding_window: a row sees keys less than this many positions before its own, where
            a node's position is the prefix length plus the ancestors it sees in the tree.

    Returns:
        ``out_THD``.

    Raises:
        ValueError: a tensor of another type, layout, size or device, or a setting out of
            range.
    """
    _check_tree(
        query_THD,
        tree_key_SHD,
        tree_value_SHD,
        query_start_loc_B1,
        tree_start_B,
        tree_lens_B,
        ancestor_bits_T,
        out_THD,
        max_query_len,
        max_tree_len,
        softcap,
    )
    batch = query_start_loc_B1.shape[0] - 1
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check(
            cache.dim() == 4
            and cache.shape == key_cache.shape
            and cache.shape[2:] == tree_key_SHD.shape[1:]
            and cache.stride(3) == 1
            and cache.dtype == query_THD.dtype,
            f"{name} must be [blocks, block size, kv heads, head dim] of {query_THD.dtype} with "
            f"a contiguous head, got {cache.dtype} {tuple(cache.shape)}, strides {cache.stride()}",
        )
    check(
        block_table_BP.dim() == 2
        and block_table_BP.shape[0] >= batch
        and block_table_BP.stride(1) == 1
        and block_table_BP.dtype == torch.int32,
        f"block_table_BP must be int32 [at least {batch}, pages] with contiguous rows, got "
        f"{block_table_BP.dtype} {tuple(block_table_BP.shape)}",
    )
    check_vector("prefix_lens_B", prefix_lens_B, batch, torch.int32)
    check(
        sliding_window is None or sliding_window > 0,
        f"sliding_window must be None or positive, got {sliding_window}",
    )
    check_same_device(
        query_THD=query_THD,
        key_cache=key_cache,
        value_cache=value_cache,
        block_table_BP=block_table_BP,
        prefix_lens_B=prefix_lens_B,
    )
    if resolve(impl, query_THD.device) == "triton":
        from vllm_eagle3.ops.kernels.tree_attention import launch as run
    else:
        run = tree_attention_torch
    run(
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
        scale=scale,
        max_query_len=max_query_len,
        max_tree_len=max_tree_len,
        softcap=softcap,
        sliding_window=sliding_window,
    )
    return out_THD


def finish_tree_attention(
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
    softcap: float = 0.0,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Add the tree part to a finished attention over the prefix, in place.

    For kernels that attend to the prefix fast but know no tree mask (FlashAttention with
    ``causal=False`` and ``seqused_k`` = prefix length): the softmax goes on where theirs
    ended, so neither a second output nor a merge is needed.

    Args:
        query_THD, tree_key_SHD, tree_value_SHD, query_start_loc_B1, tree_start_B,
        tree_lens_B, ancestor_bits_T, scale, max_query_len, max_tree_len, softcap: as in
            :func:`tree_attention`.
        out_THD: in, the attention to the prefix; out, that to prefix and tree.
        lse_HT: float32 ``[query heads, at least T]`` natural log of the prefix's sum of
            exponentials. Not finite where the prefix is empty; what ``out_THD`` holds there
            does not matter.

    Returns:
        ``out_THD``.

    Raises:
        ValueError: a tensor of another type, layout, size or device, or a setting out of
            range.
    """
    _check_tree(
        query_THD,
        tree_key_SHD,
        tree_value_SHD,
        query_start_loc_B1,
        tree_start_B,
        tree_lens_B,
        ancestor_bits_T,
        out_THD,
        max_query_len,
        max_tree_len,
        softcap,
    )
    check(
        lse_HT.dim() == 2
        and lse_HT.shape[0] == query_THD.shape[1]
        and lse_HT.shape[1] >= query_THD.shape[0]
        and lse_HT.dtype == torch.float32,
        f"lse_HT must be float32 [{query_THD.shape[1]}, at least {query_THD.shape[0]}], got "
        f"{lse_HT.dtype} {tuple(lse_HT.shape)}",
    )
    check_same_device(query_THD=query_THD, lse_HT=lse_HT)
    if resolve(impl, query_THD.device) == "triton":
        from vllm_eagle3.ops.kernels.finish_tree_attention import launch as run
    else:
        run = finish_tree_attention_torch
    run(
        query_THD,
        tree_key_SHD,
        tree_value_SHD,
        out_THD,
        lse_HT,
        query_start_loc_B1,
        tree_start_B,
        tree_lens_B,
        ancestor_bits_T,
        scale=scale,
        max_query_len=max_query_len,
        max_tree_len=max_tree_len,
        softcap=softcap,
    )
    return out_THD


def _check_tree(
    query_THD: torch.Tensor,
    tree_key_SHD: torch.Tensor,
    tree_value_SHD: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    tree_start_B: torch.Tensor,
    tree_lens_B: torch.Tensor,
    ancestor_bits_T: torch.Tensor,
    out_THD: torch.Tensor,
    max_query_len: int,
    max_tree_len: int,
    softcap: float,
) -> None:
    """Check what both operations take."""
    for name, rows in (
        ("query_THD", query_THD),
        ("tree_key_SHD", tree_key_SHD),
        ("tree_value_SHD", tree_value_SHD),
        ("out_THD", out_THD),
    ):
        check(
            rows.dim() == 3
            and rows.shape[2] == query_THD.shape[2]
            and rows.stride(2) == 1
            and rows.dtype == query_THD.dtype,
            f"{name} must be [rows, heads, head dim] of {query_THD.dtype} with a contiguous head "
            f"of the query's size, got {rows.dtype} {tuple(rows.shape)}, strides {rows.stride()}",
        )
    num_rows, num_heads, head_dim = query_THD.shape
    num_kv_heads = tree_key_SHD.shape[1]
    check(
        query_THD.dtype in _FLOATS,
        f"no tree attention for {query_THD.dtype}: use bfloat16, float16 or float32",
    )
    check(
        head_dim <= _MAX_HEAD_DIM,
        f"tree attention takes a head dimension of at most {_MAX_HEAD_DIM}, got {head_dim}",
    )
    check(
        num_heads % num_kv_heads == 0,
        f"{num_heads} query heads cannot share {num_kv_heads} kv heads evenly",
    )
    check(tree_value_SHD.shape == tree_key_SHD.shape, "tree keys and values must have one shape")
    check(
        out_THD.shape[0] >= num_rows and out_THD.shape[1] == num_heads,
        f"out_THD must be [at least {num_rows}, {num_heads}, {head_dim}], got "
        f"{tuple(out_THD.shape)}",
    )
    check_vector("query_start_loc_B1", query_start_loc_B1, 2, torch.int32)
    batch = query_start_loc_B1.shape[0] - 1
    check_vector("tree_start_B", tree_start_B, batch, torch.int32)
    check_vector("tree_lens_B", tree_lens_B, batch, torch.int32)
    check_vector("ancestor_bits_T", ancestor_bits_T, num_rows, torch.int64)
    check(max_query_len >= 1, f"max_query_len must be at least 1, got {max_query_len}")
    check(
        1 <= max_tree_len <= MAX_NODES,
        f"max_tree_len must be between 1 and {MAX_NODES}, got {max_tree_len}",
    )
    check(softcap >= 0.0, f"softcap must not be negative, got {softcap}")
    check_same_device(
        query_THD=query_THD,
        tree_key_SHD=tree_key_SHD,
        tree_value_SHD=tree_value_SHD,
        out_THD=out_THD,
        query_start_loc_B1=query_start_loc_B1,
        tree_start_B=tree_start_B,
        tree_lens_B=tree_lens_B,
        ancestor_bits_T=ancestor_bits_T,
    )
