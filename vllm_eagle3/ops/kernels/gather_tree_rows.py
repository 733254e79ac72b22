"""See :func:`vllm_eagle3.ops.gather_tree_rows`."""

import torch
import triton
import triton.language as tl


@triton.jit
def _gather_tree_rows_kernel(
    ancestor_bits_ptr,  # [R, N]
    depths_ptr,  # [R, N]
    idx_mapping_ptr,  # [B]
    query_start_loc_ptr,  # [B + 1]
    cu_num_logits_ptr,  # [B + 1]
    linear_positions_ptr,  # [T]
    out_bits_ptr,  # [T]
    out_positions_ptr,  # [T]
    out_prefix_lens_ptr,  # [P], P >= B
    seq_lens_ptr,  # [B]
    num_slots,
    num_prefix_lens,
    num_nodes: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    batch = tl.num_programs(0) - 1
    if request == batch:
        # One more program clears what padded graphs read past the batch.
        for first in range(batch, num_prefix_lens, BLOCK):
            entry = first + tl.arange(0, BLOCK)
            tl.store(out_prefix_lens_ptr + entry, 0, mask=entry < num_prefix_lens)
        return
    start = tl.load(query_start_loc_ptr + request)
    end = tl.load(query_start_loc_ptr + request + 1)
    if start == end:
        tl.store(out_prefix_lens_ptr + request, 0)
        return
    length = tl.load(cu_num_logits_ptr + request + 1) - tl.load(cu_num_logits_ptr + request)
    root = end - length
    tl.store(out_prefix_lens_ptr + request, tl.load(seq_lens_ptr + request) - length)

    for first in range(start, root, BLOCK):
        row = first + tl.arange(0, BLOCK)
        before_tree = row < root
        position = tl.load(linear_positions_ptr + row, mask=before_tree)
        tl.store(out_positions_ptr + row, position, mask=before_tree)
        tl.store(out_bits_ptr + row, tl.zeros([BLOCK], tl.int64), mask=before_tree)

    slot = tl.load(idx_mapping_ptr + request).to(tl.int64)
    has_tree = (length > 1) & (slot >= 0) & (slot < num_slots)
    num_stored = tl.where(has_tree, length, 0)
    root_position = tl.load(linear_positions_ptr + tl.minimum(root, end - 1))
    for first in range(0, length, BLOCK):
        node = first + tl.arange(0, BLOCK)
        in_tree = (node < length) & (node < num_nodes)
        stored = in_tree & (node < num_stored)
        chain_bits = (tl.full([BLOCK], 2, tl.int64) << node.to(tl.int64)) - 1
        bits = tl.load(ancestor_bits_ptr + slot * num_nodes + node, mask=stored, other=0)
        depth = tl.load(depths_ptr + slot * num_nodes + node, mask=stored, other=0)
        bits = tl.where(stored, bits, chain_bits)
        depth = tl.where(stored, depth, node)
        tl.store(out_bits_ptr + root + node, bits, mask=in_tree)
        tl.store(out_positions_ptr + root + node, root_position + depth, mask=in_tree)


def launch(
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
    """One program for each request, and one for the padding."""
    num_slots, num_nodes = ancestor_bits_RN.shape
    _gather_tree_rows_kernel[(idx_mapping_B.shape[0] + 1,)](
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
        num_slots,
        out_prefix_lens_B.shape[0],
        num_nodes=num_nodes,
        BLOCK=triton.next_power_of_2(num_nodes),
        num_warps=2,
    )
