"""The walk over a batch's logits rows against a walk in lists."""

import random

import pytest
import torch

from tests.ops.setups import ALL_IMPLS, DEVICE, Batch, int32, int64, mixed_batch, random_parents
from vllm_eagle3.ops import verify_tree


def walk(target, draft, parents):
    """Path and tokens of one request, by the definition."""
    path, tokens = [0], [target[0]]
    while True:
        children = [i for i, parent in enumerate(parents) if i and parent == path[-1]]
        match = [i for i in children if i < len(target) and draft[i] == tokens[-1]]
        if not match:
            return path, tokens
        path.append(match[0])
        tokens.append(target[match[0]])


def check(batch, parents, target, draft, impl, draft_dtype=torch.int64, columns=None):
    num_slots, num_nodes = len(parents), len(parents[0])
    columns = columns or num_nodes
    path_RN = torch.full((num_slots, num_nodes), -9, dtype=torch.int32, device=DEVICE)
    path_len_R = torch.full((num_slots,), -9, dtype=torch.int32, device=DEVICE)
    tokens_BN, num_sampled_B = verify_tree(
        int64(target),
        int64(draft).to(draft_dtype),
        int32(parents),
        batch.idx_mapping_B,
        batch.cu_num_logits_B1,
        path_RN,
        path_len_R,
        num_nodes=columns,
        impl=impl,
    )
    written = set()
    lengths = []
    first = 0
    for b, (slot, nodes) in enumerate(zip(batch.slots, batch.nodes, strict=True)):
        if nodes == 0:
            assert num_sampled_B[b] == 0
            assert tokens_BN[b].eq(0).all()
            continue
        has_slot = 0 <= slot < num_slots
        chain = list(range(-1, num_nodes - 1))
        rows = slice(first, first + nodes)
        path, tokens = walk(target[rows], draft[rows], parents[slot] if has_slot else chain)
        assert num_sampled_B[b] == len(tokens)
        assert tokens_BN[b].tolist() == tokens + [0] * (columns - len(tokens))
        if has_slot:
            written.add(slot)
            assert path_RN[slot].tolist() == path + [0] * (num_nodes - len(path))
            assert path_len_R[slot] == len(path)
        lengths.append(len(path))
        first += nodes
    for slot in set(range(num_slots)) - written:
        assert path_RN[slot].eq(-9).all()
        assert path_len_R[slot] == -9
    return lengths


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("draft_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_nodes", [2, 9, 33, 64])
def test_mixed_batch(impl, num_nodes, draft_dtype):
    """Three tokens only, so that the walks are long and siblings repeat a token."""
    lengths = []
    for seed in range(4):
        rng = random.Random(seed)
        batch = mixed_batch(seed, num_slots=9, num_nodes=num_nodes)
        parents = [random_parents(seed + slot, num_nodes, detached=0.1) for slot in range(9)]
        target, draft = ([rng.randrange(3) for _ in range(sum(batch.nodes))] for _ in range(2))
        lengths += check(batch, parents, target, draft, impl, draft_dtype)
    assert max(lengths) > 1
    assert min(lengths) == 1


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_a_whole_chain_of_64(impl):
    batch = Batch([0], [0], [64])
    target = [100 + i for i in range(64)]
    lengths = check(batch, [list(range(-1, 63))], target, [5, *target[:-1]], impl)
    assert lengths == [64]


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_large_token_ids_and_fewer_columns(impl):
    batch = Batch([1, 0], [0, 0], [3, 1])
    parents = [[-1, 0, 1, 2, 3], [-1, 0, 0, 1, 1]]
    big = 2**31 - 1
    assert check(batch, parents, [big, 4, 5, 6], [0, 1, big, 9], impl, columns=3) == [2, 1]


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_outputs_are_new_each_time(impl):
    """The last step's are still being copied to the host when the next step runs."""
    slots, logits = int64([0]), int32([0, 2])
    state = (int32([[-1, 0]]), slots, logits, int32([[0, 0]]), int32([1]))
    first = verify_tree(int64([7, 8]), int64([1, 7]), *state, num_nodes=2, impl=impl)
    kept = [tensor.clone() for tensor in first]
    verify_tree(int64([3, 4]), int64([1, 9]), *state, num_nodes=2, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_wrong_arguments_are_named():
    arguments = {
        "target_tokens_L": int64([1, 2]),
        "draft_tokens_L": int64([1, 2]),
        "parents_RN": int32([[-1, 0]]),
        "idx_mapping_B": int64([0]),
        "cu_num_logits_B1": int32([0, 2]),
        "path_RN": int32([[0, 0]]),
        "path_len_R": int32([1]),
    }
    for name in arguments:
        with pytest.raises(ValueError, match=name):
            verify_tree(**(arguments | {name: arguments[name].float()}), num_nodes=2)
    with pytest.raises(ValueError, match="num_nodes must be between 1 and 2"):
        verify_tree(**arguments, num_nodes=3)
