"""See :func:`vllm_eagle3.ops.verify_tree`."""

import torch
import triton
import triton.language as tl


@triton.jit
def _verify_tree_kernel(
    target_tokens_ptr,  # [L]
    draft_tokens_ptr,  # [L]
    parents_ptr,  # [R, N]
    idx_mapping_ptr,  # [B]
    cu_num_logits_ptr,  # [B + 1]
    path_ptr,  # [R, N]
    path_len_ptr,  # [R]
    tokens_ptr,  # [B, num_columns]
    num_sampled_ptr,  # [B]
    num_slots,
    num_columns: tl.constexpr,
    num_nodes: tl.constexpr,
    BLOCK: tl.constexpr,  # N rounded up to a power of 2
):
    request = tl.program_id(0)
    first = tl.load(cu_num_logits_ptr + request)
    length = tl.load(cu_num_logits_ptr + request + 1) - first
    slot = tl.load(idx_mapping_ptr + request).to(tl.int64)
    has_slot = (slot >= 0) & (slot < num_slots) & (length > 0)

    nodes = tl.arange(0, BLOCK)
    exists = (nodes < length) & (nodes < num_nodes)
    target_tokens = tl.load(target_tokens_ptr + first + nodes, mask=exists, other=0)
    draft_tokens = tl.load(draft_tokens_ptr + first + nodes, mask=exists, other=0).to(tl.int64)
    stored = exists & (nodes < tl.where(has_slot, length, 0))
    parents = tl.load(parents_ptr + slot * num_nodes + nodes, mask=stored, other=-1)
    parents = tl.where(stored, parents, nodes - 1)

    # All state stays in registers: places of the path and of the tokens are lanes.
    path = tl.zeros([BLOCK], tl.int32)
    emitted = tl.zeros([BLOCK], tl.int64)
    path_len = length * 0
    node = length * 0
    # Every node is visited at most once, so a corrupt tree ends the walk as well.
    while (node < BLOCK) & (path_len < length):
        path = tl.where(nodes == path_len, node, path)
        token = tl.sum(tl.where(nodes == node, target_tokens, 0), axis=0)
        emitted = tl.where(nodes == path_len, token, emitted)
        path_len += 1
        is_next = exists & (parents == node) & (draft_tokens == token)
        node = tl.min(tl.where(is_next, nodes, BLOCK), axis=0)

    tl.store(num_sampled_ptr + request, path_len)
    tl.store(tokens_ptr + request * num_columns + nodes, emitted, mask=nodes < num_columns)
    if has_slot:
        tl.store(path_ptr + slot * num_nodes + nodes, path, mask=nodes < num_nodes)
        tl.store(path_len_ptr + slot, path_len)


def launch(
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
    """One program, one warp, for each request."""
    num_slots, num_nodes = parents_RN.shape
    _verify_tree_kernel[(idx_mapping_B.shape[0],)](
        target_tokens_L,
        draft_tokens_L,
        parents_RN,
        idx_mapping_B,
        cu_num_logits_B1,
        path_RN,
        path_len_R,
        tokens_BN,
        num_sampled_B,
        num_slots,
        num_columns=tokens_BN.shape[1],
        num_nodes=num_nodes,
        BLOCK=triton.next_power_of_2(num_nodes),
        num_warps=1,
    )
