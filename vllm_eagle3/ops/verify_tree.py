"""The walk of :mod:`vllm_eagle3.tree.verify` over the logits rows of a batch."""

import torch

from vllm_eagle3.ops.dispatch import (
    Impl,
    check,
    check_matrix,
    check_same_device,
    check_vector,
    resolve,
)
from vllm_eagle3.tree.verify import verify


def verify_tree(
    target_tokens_L: torch.Tensor,
    draft_tokens_L: torch.Tensor,
    parents_RN: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    cu_num_logits_B1: torch.Tensor,
    path_RN: torch.Tensor,
    path_len_R: torch.Tensor,
    *,
    num_nodes: int,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Walk each request's tree along the tokens that the target drew.

    Node i of request b is row ``cu_num_logits[b] + i``. A request without a slot
    (``idx_mapping < 0``) is a chain, and its path is not stored. A request without rows
    emits nothing and stores nothing.

    Args:
        target_tokens_L: int64 token that the target drew at each row.
        draft_tokens_L: int32 or int64 input token of each row.
        parents_RN: int32, as in :class:`~vllm_eagle3.tree.types.TreeBuffers`.
        idx_mapping_B: int32 or int64 request slot; its length is the batch size.
        cu_num_logits_B1: int32 cumulative rows of logits, at most N for each request.
        path_RN, path_len_R: int32, written in the rows of the batch's slots; as in
            :class:`~vllm_eagle3.tree.types.Acceptance`.
        num_nodes: columns of the returned tokens, at most N.

    Returns:
        tokens ``[B, num_nodes]`` int64, the accepted drafts and then the bonus token, 0
        past them; their number ``[B]`` int32. Both are new in each call: vLLM copies them
        to the host on another stream while the next step already runs.

    Raises:
        ValueError: a tensor of another type, layout, size or device.
    """
    batch = idx_mapping_B.shape[0]
    check_vector("target_tokens_L", target_tokens_L, 1, torch.int64)
    check_vector(
        "draft_tokens_L", draft_tokens_L, target_tokens_L.shape[0], torch.int32, torch.int64
    )
    check_matrix("parents_RN", parents_RN, torch.int32)
    check_vector("idx_mapping_B", idx_mapping_B, 1, torch.int32, torch.int64)
    check_vector("cu_num_logits_B1", cu_num_logits_B1, batch + 1, torch.int32)
    check_matrix("path_RN", path_RN, torch.int32)
    check(path_RN.shape == parents_RN.shape, "path_RN and parents_RN must have one shape")
    num_slots, max_nodes = parents_RN.shape
    check_vector("path_len_R", path_len_R, num_slots, torch.int32)
    if not 1 <= num_nodes <= max_nodes:
        raise ValueError(f"num_nodes must be between 1 and {max_nodes}, got {num_nodes}")
    check_same_device(
        target_tokens_L=target_tokens_L,
        draft_tokens_L=draft_tokens_L,
        parents_RN=parents_RN,
        idx_mapping_B=idx_mapping_B,
        cu_num_logits_B1=cu_num_logits_B1,
        path_RN=path_RN,
        path_len_R=path_len_R,
    )
    tokens_BN = torch.empty(batch, num_nodes, dtype=torch.int64, device=parents_RN.device)
    num_sampled_B = torch.empty(batch, dtype=torch.int32, device=parents_RN.device)
    chosen = resolve(impl, parents_RN.device, ("extension", "triton"))
    if chosen == "extension":
        run = torch.ops.vllm_eagle3.verify_tree
    elif chosen == "triton":
        from vllm_eagle3.ops.kernels.verify_tree import launch as run
    else:
        run = _verify_tree_torch
    run(
        target_tokens_L,
        draft_tokens_L,
        parents_RN,
        idx_mapping_B,
        cu_num_logits_B1,
        path_RN,
        path_len_R,
        tokens_BN,
        num_sampled_B,
    )
    return tokens_BN, num_sampled_B


def _verify_tree_torch(
    target_tokens_L: torch.Tensor,
    draft_tokens_L: torch.Tensor,
    parents_RN: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    cu_num_logits_B1: torch.Tensor,
    path_RN: torch.Tensor,
    path_len_R: torch.Tensor,
    tokens_BN: torch.Tensor,
    num_sampled_B: torch.Tensor,
) -> None:
    num_slots, num_nodes = parents_RN.shape
    batch = idx_mapping_B.shape[0]
    nodes_N = torch.arange(num_nodes, device=parents_RN.device)
    first_B = cu_num_logits_B1[:batch].long()
    num_nodes_B = cu_num_logits_B1[1 : batch + 1] - first_B
    slots_B = idx_mapping_B.long()
    has_slot_B = (slots_B >= 0) & (slots_B < num_slots) & (num_nodes_B > 0)
    # Rows past a trimmed tree belong to the next request; `verify` does not look at them.
    rows_BN = (first_B.unsqueeze(1) + nodes_N).clamp(max=target_tokens_L.shape[0] - 1)
    parents_BN = parents_RN[slots_B.where(has_slot_B, 0)]
    accepted = verify(
        target_tokens_L[rows_BN],
        draft_tokens_L[rows_BN],
        parents_BN.where(has_slot_B.unsqueeze(1), (nodes_N - 1).int()),
        num_nodes_B,
    )
    has_rows_B = num_nodes_B > 0
    tokens_BN.copy_(accepted.tokens_BN[:, : tokens_BN.shape[1]] * has_rows_B.unsqueeze(1))
    num_sampled_B.copy_(accepted.path_len_B * has_rows_B)
    path_RN[slots_B[has_slot_B]] = accepted.path_BN[has_slot_B]
    path_len_R[slots_B[has_slot_B]] = accepted.path_len_B[has_slot_B]
