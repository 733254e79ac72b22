"""Where the rows of the accepted path are: the gather that brings them to the front."""

import torch

from vllm_eagle3.ops.dispatch import Impl, check_matrix, check_same_device, check_vector, resolve


def accepted_row_index(
    path_RN: torch.Tensor,
    path_len_R: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    cu_num_logits_B1: torch.Tensor,
    num_tokens: int,
    *,
    token_ids_T: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Index with which ``rows.index_select(0, index)`` puts the accepted path first.

    The last L rows of request b are its tree, L being its rows of logits. Row i of them
    takes row ``path[i]`` for ``i < path_len``; every other row takes itself, and so do all
    rows of a request without a slot (``idx_mapping < 0``).

    Args:
        path_RN, path_len_R: int32, as in :class:`~vllm_eagle3.tree.types.TreeBuffers`.
        idx_mapping_B: int32 or int64 request slot; its length is the batch size.
        query_start_loc_B1: int32 first row of each request, and the end.
        cu_num_logits_B1: int32 cumulative rows of logits.
        num_tokens: rows of the batch, padding included (T).
        token_ids_T: int32 or int64 for each row, reordered by the index in place. It may end
            with the last request's rows, and may go on past T.

    Returns:
        int64 ``[T]``.

    Raises:
        ValueError: a tensor of another type, layout, size or device.
    """
    batch = idx_mapping_B.shape[0]
    check_matrix("path_RN", path_RN, torch.int32)
    check_vector("path_len_R", path_len_R, path_RN.shape[0], torch.int32)
    check_vector("idx_mapping_B", idx_mapping_B, 1, torch.int32, torch.int64)
    check_vector("query_start_loc_B1", query_start_loc_B1, batch + 1, torch.int32)
    check_vector("cu_num_logits_B1", cu_num_logits_B1, batch + 1, torch.int32)
    tensors = (path_RN, path_len_R, idx_mapping_B, query_start_loc_B1, cu_num_logits_B1)
    token_ids = {}
    if token_ids_T is not None:
        check_vector("token_ids_T", token_ids_T, 0, torch.int32, torch.int64)
        token_ids["token_ids_T"] = token_ids_T
    check_same_device(
        path_RN=path_RN,
        path_len_R=path_len_R,
        idx_mapping_B=idx_mapping_B,
        query_start_loc_B1=query_start_loc_B1,
        cu_num_logits_B1=cu_num_logits_B1,
        **token_ids,
    )
    chosen = resolve(impl, path_RN.device, ("extension", "triton"))
    if chosen == "extension":
        index_T = torch.empty(num_tokens, dtype=torch.int64, device=path_RN.device)
        torch.ops.vllm_eagle3.accepted_row_index(*tensors, index_T, token_ids_T)
        return index_T
    if chosen == "triton":
        from vllm_eagle3.ops.kernels.accepted_row_index import launch as run
    else:
        run = _accepted_row_index_torch
    index_T = run(*tensors, num_tokens)
    if token_ids_T is not None:
        ids_T = token_ids_T[:num_tokens]
        ids_T.copy_(ids_T[index_T[: ids_T.shape[0]]])
    return index_T


def _accepted_row_index_torch(
    path_RN: torch.Tensor,
    path_len_R: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    cu_num_logits_B1: torch.Tensor,
    num_tokens: int,
) -> torch.Tensor:
    root_B, on_path_BN, source_BN = accepted_moves(
        path_RN, path_len_R, idx_mapping_B, query_start_loc_B1, cu_num_logits_B1
    )
    nodes_N = torch.arange(path_RN.shape[1], device=path_RN.device)
    # Node 0 of a path is the root: where there is nothing to move, it moves onto itself.
    target_BN = root_B.unsqueeze(1) + nodes_N.where(on_path_BN, 0)
    source_BN = root_B.unsqueeze(1) + source_BN.where(on_path_BN, 0)
    index_T = torch.arange(num_tokens, device=path_RN.device)
    has_rows_B = root_B < query_start_loc_B1[1 : root_B.shape[0] + 1]
    index_T[target_BN[has_rows_B]] = source_BN[has_rows_B]
    return index_T


def accepted_moves(
    path_RN: torch.Tensor,
    path_len_R: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    cu_num_logits_B1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each request: the row of its root, which nodes move, and from which node.

    Returns:
        root row ``[B]`` int64; whether place i is on the accepted path ``[B, N]``; the node
        ``path[i]`` that it takes ``[B, N]`` int64.
    """
    num_slots, num_nodes = path_RN.shape
    batch = idx_mapping_B.shape[0]
    slots_B = idx_mapping_B.long()
    has_slot_B = (slots_B >= 0) & (slots_B < num_slots)
    slots_B = slots_B.where(has_slot_B, 0)
    length_B = (cu_num_logits_B1[1 : batch + 1] - cu_num_logits_B1[:batch]).long()
    root_B = query_start_loc_B1[1 : batch + 1] - length_B
    nodes_N = torch.arange(num_nodes, device=path_RN.device)
    path_BN = path_RN[slots_B].long()
    # The bounds by L keep a path that is not of this step inside its own request.
    num_moves_B = path_len_R[slots_B].minimum(length_B).where(has_slot_B, 0)
    on_path_BN = (nodes_N < num_moves_B.unsqueeze(1)) & (path_BN < length_B.unsqueeze(1))
    return root_B, on_path_BN, path_BN
