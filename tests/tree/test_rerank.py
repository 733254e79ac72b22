import itertools
import math

import pytest
import torch

from tests.tree.naive import (
    expand,
    naive_ancestors,
    naive_pool,
    naive_rerank,
    random_levels,
)
from vllm_eagle3.tree.expand import grow, start
from vllm_eagle3.tree.mask import bits_to_mask
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.types import NO_PARENT, DraftTree

FIELDS = ("tokens_BN", "parents_BN", "depths_BN", "ancestor_bits_BN", "scores_BN")


def test_hand_worked_example():
    # Root 9. Level 1: a -1, b -2. Level 2: a -> c -1.5, d -4; b -> e -2.25, f -3.
    levels = [
        (torch.tensor([[-1.0, -2.0]]), torch.tensor([[10, 11]])),
        (
            torch.tensor([[[-0.5, -3.0], [-0.25, -1.0]]]),
            torch.tensor([[[12, 13], [14, 15]]]),
        ),
    ]
    tree = rerank(expand(levels), num_nodes=6, root_tokens_B=torch.tensor([9]))
    assert tree.tokens_BN.tolist() == [[9, 10, 12, 11, 14, 15]]
    assert tree.scores_BN.tolist() == [[0.0, -1.0, -1.5, -2.0, -2.25, -3.0]]
    assert tree.parents_BN.tolist() == [[NO_PARENT, 0, 1, 0, 3, 3]]
    assert tree.depths_BN.tolist() == [[0, 1, 2, 1, 2, 2]]
    assert tree.ancestor_bits_BN.tolist() == [
        [0b000001, 0b000011, 0b000111, 0b001001, 0b011001, 0b101001]
    ]


@pytest.mark.parametrize(
    ("depth", "top_k", "num_nodes"),
    [(1, 1, 2), (1, 8, 6), (5, 1, 6), (3, 3, 22), (6, 8, 33), (7, 10, 61), (9, 8, 64)],
)
@pytest.mark.parametrize("step", [None, 0.5, 100.0])
def test_equals_the_naive_reranking(depth, top_k, num_nodes, step):
    # step=100 rounds every score to 0: all candidates tie.
    levels = random_levels(seed=depth, batch=2, depth=depth, top_k=top_k, step=step)
    tree = rerank(expand(levels), num_nodes)
    sees_BNN = bits_to_mask(tree.ancestor_bits_BN, num_nodes)
    for request in range(2):
        pool = naive_pool(levels, request)
        kept = naive_rerank(pool, num_nodes)
        node_of = {NO_PARENT: 0} | {index: node for node, index in enumerate(kept, start=1)}
        parents = [NO_PARENT] + [node_of[pool[index].parent] for index in kept]
        assert all(parent < node for node, parent in enumerate(parents))
        assert tree.parents_BN[request].tolist() == parents
        assert tree.tokens_BN[request].tolist() == [0] + [pool[i].token for i in kept]
        assert tree.scores_BN[request].tolist() == [0.0] + [pool[i].score for i in kept]
        for node in range(num_nodes):
            seen = set(sees_BNN[request, node].nonzero().flatten().tolist())
            assert seen == naive_ancestors(parents, node)
            assert int(tree.depths_BN[request, node]) == len(seen) - 1


@pytest.mark.parametrize("seed", range(5))
def test_no_tree_of_that_size_expects_more_tokens(seed):
    levels = random_levels(seed, batch=1, depth=3, top_k=2)
    pool = naive_pool(levels, 0)
    for num_drafts in range(1, 8):
        best = max(
            math.fsum(math.exp(pool[index].score) for index in subset)
            for subset in itertools.combinations(range(len(pool)), num_drafts)
            if all(pool[index].parent in (NO_PARENT, *subset) for index in subset)
        )
        tree = rerank(expand(levels), num_drafts + 1)
        assert tree.scores_BN[0, 1:].exp().sum().item() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("step", [None, 0.5])
def test_every_prefix_is_the_best_tree_of_its_size(step):
    expansion = expand(random_levels(seed=3, batch=2, depth=4, top_k=5, step=step))
    whole = rerank(expansion, 40)
    for num_nodes in range(2, 40):
        small = rerank(expansion, num_nodes)
        for field in FIELDS:
            assert torch.equal(getattr(small, field), getattr(whole, field)[:, :num_nodes])


@pytest.mark.parametrize("seed", range(40))
def test_ties_never_separate_a_node_from_its_parent(seed):
    depth, top_k = 2 + seed % 5, 1 + seed % 7
    step = (0.25, 1.0, 3.0)[seed % 3]
    levels = random_levels(seed, batch=8, depth=depth, top_k=top_k, vocab=8, step=step)
    expansion = expand(levels)
    num_nodes = min(64, expansion.tokens_BC.shape[1] + 1)
    tree = rerank(expansion, num_nodes)
    nodes_N = torch.arange(num_nodes)
    assert (tree.parents_BN < nodes_N).all()
    parents_BM = tree.parents_BN[:, 1:].long()
    assert (parents_BM >= 0).all()
    assert (tree.scores_BN.gather(1, parents_BM) >= tree.scores_BN[:, 1:]).all()
    assert torch.equal(tree.depths_BN[:, 1:], tree.depths_BN.gather(1, parents_BM) + 1)


def test_bit_63_is_the_last_node_and_no_other():
    tree = rerank(expand(random_levels(seed=5, batch=4, depth=9, top_k=8)), 64)
    assert (tree.ancestor_bits_BN[:, 63] < 0).all()
    assert (tree.ancestor_bits_BN[:, :63] > 0).all()
    sees_BNN = bits_to_mask(tree.ancestor_bits_BN, 64)
    assert sees_BNN[:, 63, 63].all()
    assert torch.equal(sees_BNN.sum(-1) - 1, tree.depths_BN)


def test_rows_of_garbage_still_make_a_tree():
    # Idle slots of a padded batch: whatever is there, indices must stay in bounds.
    levels = random_levels(seed=0, batch=3, depth=4, top_k=4)
    for log_probs, _ in levels:
        log_probs[0] = float("nan")
        log_probs[1].flatten()[::2] = float("nan")
        log_probs[2].flatten()[::3] = float("inf")
    tree = rerank(expand(levels), 30)
    assert (tree.parents_BN[:, 1:] >= 0).all()
    assert (tree.parents_BN < torch.arange(30)).all()


@pytest.mark.parametrize("num_nodes", [1, 14, 65])
def test_refuses_a_size_that_the_pool_or_the_mask_cannot_hold(num_nodes):
    expansion = expand(random_levels(seed=0, batch=1, depth=2, top_k=3))
    with pytest.raises(ValueError, match=f"num_nodes={num_nodes} must be between 2 and 13"):
        rerank(expansion, num_nodes)


@pytest.mark.parametrize("num_drafts", [1, 3, 7, 12])
def test_few_nodes_need_no_wider_frontier(num_drafts):
    # A draft that looks at the last token alone.
    table_VV = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def tree(top_k: int) -> DraftTree:
        best_VK = table_VV.topk(top_k)
        log_probs_VK, tokens_VK = best_VK.values, best_VK.indices
        expansion = start(log_probs_VK[:3], tokens_VK[:3])
        for _ in range(4):
            parents_BK = expansion.frontier_tokens_BK
            expansion = grow(expansion, log_probs_VK[parents_BK], tokens_VK[parents_BK])
        return rerank(expansion, num_drafts + 1)

    wide, narrow = tree(16), tree(num_drafts)
    for name, expected in vars(wide).items():
        assert torch.equal(getattr(narrow, name), expected), name
