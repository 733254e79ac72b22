"""Attention of tree nodes to the committed prefix and to their own ancestors.

Shape suffixes beside those of :mod:`vllm_eagle3.tree.types`: T query rows, S rows of tree
keys, H heads, D head dimension, P pages of a block table.
"""

import torch

from vllm_eagle3.ops.attention_checks import E4M3, check_cache, check_scales, check_tree
from vllm_eagle3.ops.dispatch import Impl, check_same_device, resolve
from vllm_eagle3.ops.reference import (
    Scale,
    Scratch,
    finish_tree_attention_torch,
    tree_attention_torch,
)


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
    max_prefix_len: int | None = None,
    softcap: float = 0.0,
    sliding_window: int | None = None,
    scratch: Scratch | None = None,
    q_scale: Scale | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    num_splits: int | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Attend each query row to its request's whole prefix and to its ancestors in the tree.

    Row t of request b sees the cache's positions ``0 .. prefix_lens[b] - 1`` and the tree
    keys j whose bit is set in its word: row ``tree_start[b] + j`` of ``tree_key_SHD``.
    A row that sees nothing gets zeros. In the verification the tree keys are the step's own
    (``tree_start = query_start_loc``).

    In the draft's expansion, where every level adds rows to the same trees, they are kept in
    ``scratch``: the query rows of a request are the last nodes of its tree, ``tree_key_SHD``
    holds their keys, in the same rows, and this call stores them behind those of the earlier
    levels, ``tree_start[b] + j`` now being a row of the scratch buffers.

    With an e4m3 cache, nodes too count as if they had been through it, as they would in plain
    decoding; the scratch buffers keep them unrounded.

    Lengths are read on the device; nothing waits for it, except in the torch implementation.
    Tree keys from ``tree_lens`` on, and cache rows past the prefix or before the windows of all
    rows, are never read. The kernels allocate at most 64 MiB (or what keeps a GPU busy, if
    that is more) for the parts of long prefixes, out of the graph's pool while one is captured.

    Args:
        query_THD: ``[T, query heads, D]``, bf16, fp16, fp32, or e4m3 with ``q_scale``; D at
            most 256, contiguous.
        tree_key_SHD, tree_value_SHD: ``[S, kv heads, D]`` of the output's type.
        key_cache, value_cache: ``[blocks, block size, kv heads, D]`` of the output's type, or
            e4m3 (also as uint8) with ``k_scale`` and ``v_scale``; any strides, D contiguous.
        block_table_BP: int32 pages of each request.
        prefix_lens_B: int32 committed tokens in the cache; 0 is allowed.
        query_start_loc_B1: int32 first row of each request, and the end; a request without
            rows is padding.
        tree_start_B: int32 first row of each request's tree keys.
        tree_lens_B: int32 tree keys of each request, at most 64.
        ancestor_bits_T: int64 tree keys that each row sees; bit 63 is the sign.
        out_THD: written, bf16, fp16 or fp32; rows of no request are left alone.
        scale: of the scores, usually ``D ** -0.5``.
        max_query_len, max_tree_len: bounds on rows and tree keys of a request.
        max_prefix_len: of any request now, or of any that a captured graph will see; for the
            number of splits, on which only speed depends. None: what the block table holds.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        sliding_window: a row sees keys less than this many positions before its own, where
            a node's position is the prefix length plus the ancestors it sees in the tree.
        scratch: buffers of keys and values, ``[rows, kv heads, D]`` as ``tree_key_SHD`` and of
            the same strides; no two requests' trees may overlap there.
        q_scale, k_scale, v_scale: what the values of an e4m3 query or cache are multiples of:
            floats, or float32 tensors of one element, all of a kind.
        num_splits: into how many parts a prefix is split at most, for tests; None chooses.

    Returns:
        ``out_THD``.

    Raises:
        ValueError: a tensor of another type, layout, size or device, or a setting out of
            range.
    """
    check_tree(
        query_THD,
        tree_key_SHD,
        tree_value_SHD,
        query_start_loc_B1,
        tree_start_B,
        tree_lens_B,
        ancestor_bits_T,
        out_THD,
        scratch,
        max_query_len,
        max_tree_len,
        softcap,
    )
    scales = check_scales(query_THD, q_scale, k_scale, v_scale)
    cache_dtype = out_THD.dtype if scales is None else E4M3
    if scales is not None and key_cache.dtype == value_cache.dtype == torch.uint8:
        key_cache, value_cache = key_cache.view(E4M3), value_cache.view(E4M3)
    batch = query_start_loc_B1.shape[0] - 1
    check_cache(
        key_cache, value_cache, block_table_BP, prefix_lens_B, tree_key_SHD, batch, cache_dtype
    )
    if sliding_window is not None and sliding_window <= 0:
        raise ValueError(f"sliding_window must be None or positive, got {sliding_window}")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be None or positive, got {num_splits}")
    inputs = (
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
    )
    if resolve(impl, query_THD.device) == "torch":
        tree_attention_torch(
            *inputs,
            scale=scale,
            softcap=softcap,
            sliding_window=sliding_window,
            scratch=scratch,
            scales=scales,
        )
        return out_THD
    from vllm_eagle3.ops.kernels.tree_attention import launch

    if max_prefix_len is None:
        max_prefix_len = block_table_BP.shape[1] * key_cache.shape[1]
    launch(
        *inputs,
        scale=scale,
        max_query_len=max_query_len,
        max_tree_len=max_tree_len,
        max_prefix_len=max_prefix_len,
        softcap=softcap,
        sliding_window=sliding_window,
        scratch=scratch,
        scales=scales,
        num_splits=num_splits,
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
    scratch: Scratch | None = None,
    q_scale: Scale | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Add the tree part to a finished attention over the prefix, in place.

    For kernels that attend to the prefix fast but know no tree mask (FlashAttention with
    ``causal=False`` and ``seqused_k`` = prefix length): the softmax goes on where theirs
    ended, so neither a second output nor a merge is needed.

    Args:
        query_THD, tree_key_SHD, tree_value_SHD, query_start_loc_B1, tree_start_B,
        tree_lens_B, ancestor_bits_T, scale, max_query_len, max_tree_len, softcap, scratch,
        q_scale, k_scale, v_scale: as in :func:`tree_attention`; the latter two if the cache
            that the prefix was read from is e4m3.
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
    check_tree(
        query_THD,
        tree_key_SHD,
        tree_value_SHD,
        query_start_loc_B1,
        tree_start_B,
        tree_lens_B,
        ancestor_bits_T,
        out_THD,
        scratch,
        max_query_len,
        max_tree_len,
        softcap,
    )
    scales = check_scales(query_THD, q_scale, k_scale, v_scale)
    if (
        lse_HT.dim() != 2
        or lse_HT.shape[0] != query_THD.shape[1]
        or lse_HT.shape[1] < query_THD.shape[0]
        or lse_HT.dtype != torch.float32
    ):
        raise ValueError(
            f"lse_HT must be float32 [{query_THD.shape[1]}, at least {query_THD.shape[0]}], got "
            f"{lse_HT.dtype} {tuple(lse_HT.shape)}"
        )
    check_same_device(query_THD=query_THD, lse_HT=lse_HT)
    if resolve(impl, query_THD.device) == "torch":
        finish_tree_attention_torch(
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
            softcap=softcap,
            scratch=scratch,
            scales=scales,
        )
        return out_THD
    from vllm_eagle3.ops.kernels.finish_tree_attention import launch

    launch(
        query_THD,
        tree_key_SHD,
        tree_value_SHD,
        out_THD.unsqueeze(0),
        lse_HT.unsqueeze(0),
        out_THD,
        None,
        query_start_loc_B1,
        tree_start_B,
        tree_lens_B,
        ancestor_bits_T,
        scale=scale,
        max_query_len=max_query_len,
        max_tree_len=max_tree_len,
        softcap=softcap,
        scratch=scratch,
        scales=scales,
    )
    return out_THD
