import itertools

import pytest
import torch

from vllm_eagle3.tree.compact import compact_rows, compact_slots


def all_paths(num_nodes: int) -> list[list[int]]:
    """Every rising list of nodes that starts at the root."""
    drafts = range(1, num_nodes)
    return [
        [0, *nodes]
        for length in range(num_nodes)
        for nodes in itertools.combinations(drafts, length)
    ]


def padded(paths: list[list[int]], num_nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [path + [0] * (num_nodes - len(path)) for path in paths]
    return torch.tensor(rows, dtype=torch.int32), torch.tensor(
        [len(path) for path in paths], dtype=torch.int32
    )


@pytest.mark.parametrize("num_nodes", range(1, 7))
def test_all_paths_in_one_batch(num_nodes):
    paths = all_paths(num_nodes)
    path_BN, path_len_B = padded(paths, num_nodes)
    num_slots = len(paths) * num_nodes + 10
    generator = torch.Generator().manual_seed(num_nodes)
    slots_BN = torch.randperm(num_slots, generator=generator)[: path_BN.numel()]
    slots_BN = slots_BN.view_as(path_BN)
    cache = torch.arange(num_slots * 6).view(num_slots, 2, 3)
    expected = cache.clone()
    for slots, path in zip(slots_BN.tolist(), paths, strict=True):
        for place, node in enumerate(path):
            expected[slots[place]] = cache[slots[node]]
    before_BN = cache[slots_BN]
    compact_slots(cache, slots_BN, path_BN, path_len_B)
    assert torch.equal(cache, expected)
    # The same by rows.
    assert torch.equal(compact_rows(before_BN, path_BN, path_len_B), cache[slots_BN])


def test_a_node_that_is_source_and_destination():
    cache = torch.arange(10.0)
    path_BN, path_len_B = padded([[0, 5, 6]], 7)
    compact_slots(cache, torch.tensor([[5, 6, 1, 2, 3, 0, 9]]), path_BN, path_len_B)
    #      node 5 (slot 0) -> place 1 (slot 6); node 6 (slot 9) -> place 2 (slot 1)
    assert cache.tolist() == [0, 9, 2, 3, 4, 5, 0, 7, 8, 9]

    cache = torch.arange(10.0)
    path_BN, path_len_B = padded([[0, 2, 3, 4]], 5)
    compact_slots(cache, torch.arange(5).unsqueeze(0), path_BN, path_len_B)
    assert cache.tolist() == [0, 2, 3, 4, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8])
def test_moves_bits_of_any_type_in_a_strided_cache(dtype):
    keys_and_values = torch.arange(24).view(2, 12).to(dtype)
    path_BN, path_len_B = padded([[0, 3]], 4)
    compact_slots(keys_and_values[1], torch.tensor([[2, 4, 6, 8]]), path_BN, path_len_B)
    assert keys_and_values[1].tolist() == [12, 13, 14, 15, 20, 17, 18, 19, 20, 21, 22, 23]
    assert keys_and_values[0].tolist() == list(range(12))


def test_nodes_without_a_slot_are_skipped():
    path_BN, path_len_B = padded([[0, 2, 3], [0, 2, 3], [0, 3, 3]], 4)
    slots_BN = torch.tensor([[-1] * 4, [4, -1, 5, 6], [7, 8, 9, -1]])
    cache = torch.arange(10)
    compact_slots(cache, slots_BN, path_BN, path_len_B)
    assert cache.tolist() == [0, 1, 2, 3, 4, 6, 6, 7, 8, 9]


@pytest.mark.parametrize("slots", [[-99, -99, -99], [-99, -99, 7], [-99, 7, -99]])
def test_nothing_moves_where_no_move_is_whole(slots):
    path_BN, path_len_B = padded([[0, 2]], 3)
    cache = torch.arange(10)
    compact_slots(cache, torch.tensor([slots]), path_BN, path_len_B)
    assert cache.tolist() == list(range(10))
