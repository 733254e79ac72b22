"""See :func:`vllm_eagle3.ops.compact_kv`."""

import torch
import triton
import triton.language as tl

from vllm_eagle3.ops.compact_kv import KVCacheTable

_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _compact_kv_kernel(
    layout_ptr,  # [L, 6]: address, strides of block, head and token, block size, group
    num_words_ptr,  # [L]
    num_heads_ptr,  # [L]
    slot_mappings_ptr,  # [G, T]
    slot_mappings_stride,
    path_ptr,  # [R, N]
    path_len_ptr,  # [R]
    idx_mapping_ptr,  # [B]
    query_start_loc_ptr,  # [B + 1]
    cu_num_logits_ptr,  # [B + 1]
    num_slots,
    num_nodes: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,  # words of an entry, rounded up to a power of 2
):
    layer = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    slot = tl.load(idx_mapping_ptr + request).to(tl.int64)
    if (slot < 0) | (slot >= num_slots):
        return
    if head >= tl.load(num_heads_ptr + layer):
        return
    length = tl.load(cu_num_logits_ptr + request + 1) - tl.load(cu_num_logits_ptr + request)
    root = tl.load(query_start_loc_ptr + request + 1) - length
    # The bounds by `length` keep a path that is not of this step inside its own request.
    path_len = tl.minimum(tl.load(path_len_ptr + slot), length)

    layout_ptr += layer * 6
    address = tl.load(layout_ptr)
    block_stride = tl.load(layout_ptr + 1)
    head_stride = tl.load(layout_ptr + 2)
    token_stride = tl.load(layout_ptr + 3)
    block_size = tl.load(layout_ptr + 4)
    group = tl.load(layout_ptr + 5)
    slot_mapping_ptr = slot_mappings_ptr + group * slot_mappings_stride + root
    word = tl.arange(0, BLOCK)
    in_entry = word < tl.load(num_words_ptr + layer)
    entry_ptr = address.to(tl.pointer_type(WORD)) + head * head_stride + word

    # In place, and so strictly in this order: path[i] >= i, so what place i overwrites was
    # read already or is never read. Each lane reads and writes the same words of every
    # entry, and no other program touches this head of this request.
    for place in range(1, path_len):
        node = tl.load(path_ptr + slot * num_nodes + place)
        if (node != place) & (node < length):
            source = tl.load(slot_mapping_ptr + node)
            target = tl.load(slot_mapping_ptr + place)
            if (source >= 0) & (target >= 0):
                source_offset = source // block_size * block_stride
                source_offset += source % block_size * token_stride
                target_offset = target // block_size * block_stride
                target_offset += target % block_size * token_stride
                words = tl.load(entry_ptr + source_offset, mask=in_entry)
                tl.store(entry_ptr + target_offset, words, mask=in_entry)


def launch(
    table: KVCacheTable,
    slot_mappings_GT: torch.Tensor,
    path_RN: torch.Tensor,
    path_len_R: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    cu_num_logits_B1: torch.Tensor,
) -> None:
    """One program, one warp, for each layer, head and request."""
    num_slots, num_nodes = path_RN.shape
    _compact_kv_kernel[(table.num_layers, table.num_heads, idx_mapping_B.shape[0])](
        table.layout_L6,
        table.num_words_L,
        table.num_heads_L,
        slot_mappings_GT,
        slot_mappings_GT.stride(0),
        path_RN,
        path_len_R,
        idx_mapping_B,
        query_start_loc_B1,
        cu_num_logits_B1,
        num_slots,
        num_nodes=num_nodes,
        WORD=_WORDS[table.word_bytes],
        BLOCK=triton.next_power_of_2(table.num_words),
        num_warps=1,
    )
