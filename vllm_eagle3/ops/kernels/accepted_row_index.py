"""See :func:`vllm_eagle3.ops.accepted_row_index`."""

import torch
import triton
import triton.language as tl

_BLOCK = 64


@triton.jit(do_not_specialize=["num_tokens"])
def _accepted_row_index_kernel(
    path_ptr,  # [R, N]
    path_len_ptr,  # [R]
    idx_mapping_ptr,  # [B]
    query_start_loc_ptr,  # [B + 1]
    cu_num_logits_ptr,  # [B + 1]
    index_ptr,  # [T]
    num_slots,
    num_tokens,
    num_nodes: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    batch = tl.num_programs(0) - 1
    start = tl.load(query_start_loc_ptr + request)
    if request == batch:
        # One more program: the padding rows take themselves.
        for first in range(start, num_tokens, BLOCK):
            row = first + tl.arange(0, BLOCK)
            tl.store(index_ptr + row, row.to(tl.int64), mask=row < num_tokens)
        return
    end = tl.load(query_start_loc_ptr + request + 1)
    length = tl.load(cu_num_logits_ptr + request + 1) - tl.load(cu_num_logits_ptr + request)
    root = end - length
    slot = tl.load(idx_mapping_ptr + request).to(tl.int64)
    has_slot = (slot >= 0) & (slot < num_slots)
    path_len = tl.load(path_len_ptr + slot, mask=has_slot, other=0)

    for first in range(start, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        place = row - root
        on_path = (place >= 0) & (place < path_len) & (place < num_nodes) & (row < end)
        node = tl.load(path_ptr + slot * num_nodes + place, mask=on_path, other=0)
        # A path that is not of this step must not lead out of its request.
        source = tl.where(on_path & (node < length), root + node, row)
        tl.store(index_ptr + row, source.to(tl.int64), mask=row < end)


def launch(
    path_RN: torch.Tensor,
    path_len_R: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    cu_num_logits_B1: torch.Tensor,
    num_tokens: int,
) -> torch.Tensor:
    """One program for each request, and one for the padding."""
    index_T = torch.empty(num_tokens, dtype=torch.int64, device=path_RN.device)
    num_slots, num_nodes = path_RN.shape
    _accepted_row_index_kernel[(idx_mapping_B.shape[0] + 1,)](
        path_RN,
        path_len_R,
        idx_mapping_B,
        query_start_loc_B1,
        cu_num_logits_B1,
        index_T,
        num_slots,
        num_tokens,
        num_nodes=num_nodes,
        BLOCK=_BLOCK,
        num_warps=1,
    )
    return index_T
