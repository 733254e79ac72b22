"""Tree attention in plain torch: the reference of the kernels, and what runs on the CPU.

One request at a time, in float32. It reads lengths on the host, so on a GPU it waits.
"""

import itertools

import torch

from vllm_eagle3.tree.mask import bits_to_mask

Scale = float | torch.Tensor
# Of query (None: not quantised), keys and values, all on the device or none.
Scales = tuple[Scale | None, Scale, Scale]
# Keys and values of the nodes of a draft's levels, [rows, kv heads, D] of the same strides.
Scratch = tuple[torch.Tensor, torch.Tensor]

_E4M3_MAX = 448.0


def tree_attention_torch(
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
    softcap: float,
    sliding_window: int | None,
    scratch: Scratch | None,
    scales: Scales | None,
) -> None:
    """See :func:`vllm_eagle3.ops.tree_attention`."""
    block_size = key_cache.shape[1]
    prefix_lens = prefix_lens_B.tolist()
    requests = _requests(query_start_loc_B1, tree_start_B, tree_lens_B)
    tree_key_SHD, tree_value_SHD = _all_levels(tree_key_SHD, tree_value_SHD, scratch, requests)
    query_THD, tree_key_SHD, tree_value_SHD = _dequantised(
        query_THD, tree_key_SHD, tree_value_SHD, scales
    )
    for b, rows, tree_rows in requests:
        prefix_len = prefix_lens[b]
        pages = block_table_BP[b, : -(-prefix_len // block_size)].long()
        mask_QS = _visible(ancestor_bits_T[rows], prefix_len, tree_rows, sliding_window)
        # Rows past the prefix and before every window may hold anything, NaN too.
        first = 0 if sliding_window is None else max(0, prefix_len - sliding_window)
        mask_QS, used = mask_QS[:, first:], slice(first, prefix_len)
        # [pages * block size, kv heads, D], cut to what is used.
        prefix_key_SHD = key_cache[pages].flatten(0, 1)[used].float()
        prefix_value_SHD = value_cache[pages].flatten(0, 1)[used].float()
        if scales is not None:
            prefix_key_SHD = prefix_key_SHD * scales[1]
            prefix_value_SHD = prefix_value_SHD * scales[2]
        key_SHD = torch.cat([prefix_key_SHD, tree_key_SHD[tree_rows].float()])
        value_SHD = torch.cat([prefix_value_SHD, tree_value_SHD[tree_rows].float()])
        scores_HQS = _scores(query_THD[rows], key_SHD, mask_QS, scale, softcap)
        out_THD[rows] = _weighted_sum(_softmax(scores_HQS), value_SHD, out_THD.dtype)


def finish_tree_attention_torch(
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
    softcap: float,
    scratch: Scratch | None,
    scales: Scales | None,
) -> None:
    """See :func:`vllm_eagle3.ops.finish_tree_attention`."""
    requests = _requests(query_start_loc_B1, tree_start_B, tree_lens_B)
    tree_key_SHD, tree_value_SHD = _all_levels(tree_key_SHD, tree_value_SHD, scratch, requests)
    query_THD, tree_key_SHD, tree_value_SHD = _dequantised(
        query_THD, tree_key_SHD, tree_value_SHD, scales
    )
    for _, rows, tree_rows in requests:
        mask_QS = _visible(ancestor_bits_T[rows], 0, tree_rows, None)
        scores_HQS = _scores(query_THD[rows], tree_key_SHD[tree_rows], mask_QS, scale, softcap)
        prefix_HQ1 = lse_HT[:, rows].unsqueeze(2)
        # The prefix joins the softmax as one more key, with its own output as the value.
        prefix_HQ1 = prefix_HQ1.where(prefix_HQ1.isfinite(), float("-inf"))
        weights = _softmax(torch.cat([prefix_HQ1, scores_HQS], dim=2))
        prefix_QH1, weights_HQS = weights[:, :, :1].transpose(0, 1), weights[:, :, 1:]
        prefix_QHD = out_THD[rows].float().where(prefix_QH1 > 0, 0.0) * prefix_QH1
        tree_QHD = _weighted_sum(weights_HQS, tree_value_SHD[tree_rows], torch.float32)
        out_THD[rows] = (prefix_QHD + tree_QHD).to(out_THD.dtype)


def _requests(
    query_start_loc_B1: torch.Tensor, tree_start_B: torch.Tensor, tree_lens_B: torch.Tensor
) -> list[tuple[int, slice, slice]]:
    """Number, query rows and tree key rows of each request that has rows."""
    starts = query_start_loc_B1.tolist()
    tree_starts, tree_lens = tree_start_B.tolist(), tree_lens_B.tolist()
    return [
        (b, slice(start, end), slice(tree_starts[b], tree_starts[b] + tree_lens[b]))
        for b, (start, end) in enumerate(itertools.pairwise(starts))
        if end > start
    ]


def _all_levels(
    tree_key_SHD: torch.Tensor,
    tree_value_SHD: torch.Tensor,
    scratch: Scratch | None,
    requests: list[tuple[int, slice, slice]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all nodes: the scratch buffers, once they hold the new level."""
    if scratch is None:
        return tree_key_SHD, tree_value_SHD
    for _, rows, tree_rows in requests:
        level = slice(tree_rows.stop - (rows.stop - rows.start), tree_rows.stop)
        scratch[0][level] = tree_key_SHD[rows]
        scratch[1][level] = tree_value_SHD[rows]
    return scratch


def _dequantised(
    query_THD: torch.Tensor,
    tree_key_SHD: torch.Tensor,
    tree_value_SHD: torch.Tensor,
    scales: Scales | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The query, and keys and values as they would come back from a cache of e4m3."""
    if scales is None:
        return query_THD, tree_key_SHD, tree_value_SHD
    query_scale, key_scale, value_scale = scales

    def through_cache(rows_SHD: torch.Tensor, scale: Scale) -> torch.Tensor:
        # torch does not saturate, the cache's write does.
        units = (rows_SHD.float() / scale).clamp(-_E4M3_MAX, _E4M3_MAX)
        return units.to(torch.float8_e4m3fn).float() * scale

    if query_scale is not None:
        query_THD = query_THD.float() * query_scale
    return (
        query_THD,
        through_cache(tree_key_SHD, key_scale),
        through_cache(tree_value_SHD, value_scale),
    )


def _visible(
    bits_Q: torch.Tensor, prefix_len: int, tree_rows: slice, sliding_window: int | None
) -> torch.Tensor:
    """Which keys, prefix first and then tree, each row sees: bool ``[Q, S]``."""
    tree_QM = bits_to_mask(bits_Q, tree_rows.stop - tree_rows.start)
    prefix_QP = tree_QM.new_ones(bits_Q.shape[0], prefix_len)
    if sliding_window is not None:
        # An ancestor's depth is its rank among the ancestors that the row sees.
        depth_QM = tree_QM.cumsum(dim=1) - 1
        depth_Q1 = tree_QM.sum(dim=1, keepdim=True) - 1
        positions_P = torch.arange(prefix_len, device=bits_Q.device)
        prefix_QP = positions_P > prefix_len + depth_Q1 - sliding_window
        tree_QM = tree_QM & (depth_QM > depth_Q1 - sliding_window)
    return torch.cat([prefix_QP, tree_QM], dim=1)


def _scores(
    query_QHD: torch.Tensor,
    key_SHD: torch.Tensor,
    mask_QS: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Scores of all query heads, -inf where hidden: float32 ``[query heads, Q, S]``."""
    num_rows, num_heads, head_dim = query_QHD.shape
    num_kv_heads = key_SHD.shape[1]
    # The heads of a group meet their key head as rows of one product.
    grouped = query_QHD.float().transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    scores_HQS = (grouped @ key_SHD.float().permute(1, 2, 0)).view(num_heads, num_rows, -1) * scale
    if softcap > 0:
        scores_HQS = softcap * torch.tanh(scores_HQS / softcap)
    return scores_HQS.masked_fill_(~mask_QS, float("-inf"))


def _softmax(scores_HQS: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys; zeros for a row that sees nothing."""
    sees_nothing_HQ1 = scores_HQS.amax(dim=2, keepdim=True) == float("-inf")
    return scores_HQS.softmax(dim=2).masked_fill(sees_nothing_HQ1, 0.0)


def _weighted_sum(
    weights_HQS: torch.Tensor, value_SHD: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Values under the weights: ``[Q, query heads, D]``."""
    num_heads, num_rows, num_keys = weights_HQS.shape
    num_kv_heads, head_dim = value_SHD.shape[1:]
    grouped = weights_HQS.reshape(num_kv_heads, -1, num_keys)
    out_HQD = (grouped @ value_SHD.float().transpose(0, 1)).view(num_heads, num_rows, head_dim)
    return out_HQD.transpose(0, 1).to(dtype)
