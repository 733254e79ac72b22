"""How layers adopt trees, and how a batch is split into trees and the rest."""

from types import SimpleNamespace

import pytest
import torch

from vllm_eagle3.engine import attention
from vllm_eagle3.engine.compat import CommonAttentionMetadata, CPUAttentionBackend


def test_a_layer_with_metadata_of_its_own_is_refused():
    """Its backend has the name of a supported one: vLLM derives it from that."""
    backend = type("ChunkedLocalAttention_8_CPUAttentionBackend", (CPUAttentionBackend,), {})
    layer = SimpleNamespace(attn_backend=backend, impl=SimpleNamespace())
    with pytest.raises(ValueError, match=r"ChunkedLocalAttention_8.*leave tree out"):
        attention.adopt({"layers.0": layer}, None)


def test_images_of_the_tail_keep_their_requests():
    starts = torch.tensor([0, 3, 6, 16], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([9, 9, 10], dtype=torch.int32),
        num_reqs=3,
        num_actual_tokens=16,
        max_query_len=10,
        max_seq_len=10,
        block_table_tensor=torch.zeros(3, 1, dtype=torch.int32),
        slot_mapping=torch.arange(16),
        mm_req_doc_ranges={0: [(1, 2)], 1: [], 2: [(4, 7)]},
    )
    rows = SimpleNamespace(num_reqs=2, num_tokens=6)
    tail = attention._tail(common, rows)
    assert tail.mm_req_doc_ranges == {0: [(4, 7)]}
    assert tail.query_start_loc.tolist() == [0, 10]
