import random

import pytest
import torch

from tests.tree.naive import naive_ancestors, random_parents
from vllm_eagle3.tree.mask import ancestor_bits, bits_to_mask, chain_parents, depths
from vllm_eagle3.tree.types import NO_PARENT


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 5, 8, 33, 63, 64])
def test_bits_depths_and_mask_of_random_trees(num_nodes):
    rng = random.Random(num_nodes)
    trees = [random_parents(rng, num_nodes, detached) for detached in (0, 0, 0.3)]
    parents_BN = torch.tensor(trees, dtype=torch.int32)
    bits_BN, depths_BN = ancestor_bits(parents_BN), depths(parents_BN)
    mask_BNN = bits_to_mask(bits_BN, num_nodes)
    assert bits_BN.dtype == torch.int64
    assert depths_BN.dtype == torch.int32
    for request, parents in enumerate(trees):
        for node in range(num_nodes):
            seen = naive_ancestors(parents, node)
            assert int(bits_BN[request, node]) % 2**64 == sum(1 << other for other in seen)
            assert mask_BNN[request, node].nonzero().flatten().tolist() == sorted(seen)
            assert int(depths_BN[request, node]) == len(seen) - 1


@pytest.mark.parametrize("num_nodes", range(1, 18))
def test_the_longest_chain_sees_all_before_it(num_nodes):
    parents_N = chain_parents(num_nodes, num_nodes - 1)
    sees_NN = bits_to_mask(ancestor_bits(parents_N), num_nodes)
    assert torch.equal(sees_NN, torch.ones(num_nodes, num_nodes).tril().bool())
    assert depths(parents_N).tolist() == list(range(num_nodes))


@pytest.mark.parametrize("max_depth", range(1, 9))
def test_a_known_depth_changes_nothing(max_depth):
    parents_N = chain_parents(12, max_depth)
    assert torch.equal(ancestor_bits(parents_N, max_depth), ancestor_bits(parents_N))
    assert torch.equal(depths(parents_N, max_depth), depths(parents_N))


def test_a_chain_is_followed_by_detached_nodes_that_see_the_root_and_themselves():
    parents_N = chain_parents(6, length=3)
    assert parents_N.tolist() == [NO_PARENT, 0, 1, 2, NO_PARENT, NO_PARENT]
    assert parents_N.dtype == torch.int32
    assert ancestor_bits(parents_N).tolist() == [1, 0b11, 0b111, 0b1111, 0b010001, 0b100001]
    assert depths(parents_N).tolist() == [0, 1, 2, 3, 1, 1]
    assert chain_parents(3, length=0).tolist() == [NO_PARENT] * 3


def test_mask_columns_past_the_tree_are_empty():
    assert bits_to_mask(torch.tensor([0b1, 0b11]), 4).tolist() == [
        [True, False, False, False],
        [True, True, False, False],
    ]
