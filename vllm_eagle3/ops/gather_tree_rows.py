"""Trees from request slots to the rows of the running batch."""

import torch

from vllm_eagle3.ops.dispatch import (
    Impl,
    check,
    check_matrix,
    check_same_device,
    check_vector,
    resolve,
)


def gather_tree_rows(
    ancestor_bits_RN: torch.Tensor,
    depths_RN: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    cu_num_logits_B1: torch.Tensor,
    linear_positions_T: torch.Tensor,
    out_bits_T: torch.Tensor,
    out_positions_T: torch.Tensor,
    out_prefix_lens_B: torch.Tensor,
    seq_lens_B: torch.Tensor,
    *,
    impl: Impl = "auto",
) -> None:
    """Fill ancestor bits, rotary positions and prefix lengths of a batch, in place.

    The last L rows of request b are its tree, L being its rows of logits: node i gets
    the bits of node i of its slot and the position of the root plus the depth of the node.
    A request of one logits row is a one-node tree, whatever its slot holds; one without a
    slot (``idx_mapping < 0``) is a chain. Rows before the last L, a prefill's, keep their
    linear position and get no bits. The prefix is everything before the tree. A request
    without rows, and the entries past the batch, get prefix length 0; rows of no request
    are left alone.

    Args:
        ancestor_bits_RN, depths_RN: int64 and int32, as in
            :class:`~vllm_eagle3.tree.types.TreeBuffers`.
        idx_mapping_B: int32 or int64 request slot; its length is the batch size.
        query_start_loc_B1: int32 first row of each request, and the end.
        cu_num_logits_B1: int32 cumulative rows of logits.
        linear_positions_T: int64 positions as without a tree.
        out_bits_T: int64, written.
        out_positions_T: int64, written.
        out_prefix_lens_B: int32, written; may be longer than the batch.
        seq_lens_B: int32 length of each sequence, this batch's rows included.

    Raises:
        ValueError: a tensor of another type, layout, size or device.
    """
    batch = idx_mapping_B.shape[0]
    num_rows = linear_positions_T.shape[0]
    check_matrix("ancestor_bits_RN", ancestor_bits_RN, torch.int64)
    check_matrix("depths_RN", depths_RN, torch.int32)
    check(depths_RN.shape == ancestor_bits_RN.shape, "depths and bits must have one shape")
    check_vector("idx_mapping_B", idx_mapping_B, 1, torch.int32, torch.int64)
    check_vector("query_start_loc_B1", query_start_loc_B1, batch + 1, torch.int32)
    check_vector("cu_num_logits_B1", cu_num_logits_B1, batch + 1, torch.int32)
    check_vector("linear_positions_T", linear_positions_T, 0, torch.int64)
    check_vector("out_bits_T", out_bits_T, num_rows, torch.int64)
    check_vector("out_positions_T", out_positions_T, num_rows, torch.int64)
    check_vector("out_prefix_lens_B", out_prefix_lens_B, batch, torch.int32)
    check_vector("seq_lens_B", seq_lens_B, batch, torch.int32)
    check_same_device(
        ancestor_bits_RN=ancestor_bits_RN,
        depths_RN=depths_RN,
        idx_mapping_B=idx_mapping_B,
        query_start_loc_B1=query_start_loc_B1,
        cu_num_logits_B1=cu_num_logits_B1,
        linear_positions_T=linear_positions_T,
        out_bits_T=out_bits_T,
        out_positions_T=out_positions_T,
        out_prefix_lens_B=out_prefix_lens_B,
        seq_lens_B=seq_lens_B,
    )
    tensors = (
        ancestor_bits_RN,
        depths_RN,
        idx_mapping_B,
        query_start_loc_B1,
        cu_num_logits_B1,
        linear_positions_T,
        out_bits_T,
        out_positions_T,
        out_prefix_lens_B,
        seq_lens_B,
    )
    chosen = resolve(impl, idx_mapping_B.device, ("extension", "triton"))
    if chosen == "extension":
        torch.ops.vllm_eagle3.gather_tree_rows(*tensors)
    elif chosen == "triton":
        from vllm_eagle3.ops.kernels.gather_tree_rows import launch

        launch(*tensors)
    else:
        _gather_tree_rows_torch(*tensors)


def _gather_tree_rows_torch(
    ancestor_bits_RN: torch.Tensor,
    depths_RN: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    cu_num_logits_B1: torch.Tensor,
    linear_positions_T: torch.Tensor,
    out_bits_T: torch.Tensor,
    out_positions_T: torch.Tensor,
    out_prefix_lens_B: torch.Tensor,
    seq_lens_B: torch.Tensor,
) -> None:
    num_slots, num_nodes = ancestor_bits_RN.shape
    nodes_N = torch.arange(num_nodes, device=ancestor_bits_RN.device)
    chain_bits_N = (torch.full_like(nodes_N, 2) << nodes_N) - 1
    starts = query_start_loc_B1.tolist()
    cu_num_logits = cu_num_logits_B1.tolist()
    out_prefix_lens_B.zero_()
    for b, slot in enumerate(idx_mapping_B.tolist()):
        start, end = starts[b], starts[b + 1]
        if start == end:
            continue
        length = cu_num_logits[b + 1] - cu_num_logits[b]
        root = end - length
        out_bits_T[start:root] = 0
        out_positions_T[start:root] = linear_positions_T[start:root]
        bits_N, depth_N = chain_bits_N, nodes_N
        if length > 1 and 0 <= slot < num_slots:
            bits_N, depth_N = ancestor_bits_RN[slot], depths_RN[slot]
        out_bits_T[root:end] = bits_N[:length]
        out_positions_T[root:end] = linear_positions_T[root : root + 1] + depth_N[:length]
        out_prefix_lens_B[b] = seq_lens_B[b] - length
