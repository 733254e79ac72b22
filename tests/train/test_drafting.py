"""Static trees below the slots of a document, against dynamic ones that keep every candidate."""

import pytest
import torch

from tests.train import small
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.train.data import TokenBatch
from vllm_eagle3.train.drafting import DocumentDrafter
from vllm_eagle3.train.objectives import OBJECTIVES

STATIC = TreeConfig.static([[0], [1], [0, 0], [2], [1, 0], [1, 1], [3], [2, 0], [3, 0], [3, 1]])
EVERYTHING = TreeConfig(4 + 4 * 4, depth=2, top_k=4, verify_budget=None)


@pytest.mark.parametrize("name", ["eagle3", "eagle1"])
def test_a_static_tree_is_the_children_of_its_ranks(name: str) -> None:
    objective = OBJECTIVES[name]
    target, head = small.head_for(objective, torch.float32)
    tokens_1T = torch.from_numpy(small.documents(3)[2].tokens).unsqueeze(0)
    batch = TokenBatch(tokens_1T, torch.ones_like(tokens_1T, dtype=torch.bool))
    features_1TF = objective.read(target, batch, head).features_BTF
    drafter = DocumentDrafter(head, tokens_1T, features_1TF)
    slots_R = torch.arange(tokens_1T.shape[1] - 1)
    roots = torch.zeros_like(slots_R), slots_R
    whole, tree = drafter.trees(*roots, EVERYTHING), drafter.trees(*roots, STATIC)
    for root in range(len(slots_R)):
        # Nodes stand in order of falling score, and so do the children of each.
        parents = whole.parents_BN[root].tolist()
        node_of = {(): 0}
        for path in STATIC.paths:
            children = [n for n in range(1, 21) if parents[n] == node_of[path[:-1]]]
            node_of[path] = children[path[-1]]
        nodes = [node_of[path] for path in STATIC.paths]
        assert torch.equal(tree.tokens_BN[root, 1:], whole.tokens_BN[root, nodes])
        torch.testing.assert_close(tree.scores_BN[root, 1:], whole.scores_BN[root, nodes])
        assert tree.tokens_BN[root, 0] == whole.tokens_BN[root, 0]
