"""The chain inside a tree, against a walk over lists."""

import random

import pytest
import torch

from tests.tree.naive import random_parents
from vllm_eagle3.tree import mask
from vllm_eagle3.tree.chain import best_chain
from vllm_eagle3.tree.types import NO_PARENT, DraftTree


@pytest.mark.parametrize("depth", [1, 3, 11])
def test_each_node_keeps_its_best_child_only(depth: int) -> None:
    rng = random.Random(depth)
    parents = [random_parents(rng, 12, detached=0.2) for _ in range(40)]
    parents_BN = torch.tensor(parents, dtype=torch.int32)
    tree = DraftTree(
        tokens_BN=torch.arange(40 * 12).view(40, 12),
        parents_BN=parents_BN,
        depths_BN=mask.depths(parents_BN),
        ancestor_bits_BN=mask.ancestor_bits(parents_BN),
        scores_BN=-torch.arange(12.0).expand(40, 12),
    )
    chain = best_chain(tree, depth)
    for row, of in enumerate(parents):
        path = [0]
        while len(path) <= depth and path[-1] in of[1:]:
            path.append(of.index(path[-1], 1))
        length = len(path) - 1
        assert chain.parents_BN[row].tolist() == [NO_PARENT, *range(length)] + [NO_PARENT] * (
            11 - length
        )
        drafts = tree.tokens_BN[row, path[1:]].tolist()
        assert chain.tokens_BN[row, 1:].tolist() == drafts + [0] * (11 - length)
        assert chain.scores_BN[row, 1 : length + 1].tolist() == [-float(i) for i in path[1:]]
        assert chain.depths_BN[row, : length + 1].tolist() == list(range(length + 1))
