import random

import pytest
import torch

from tests.tree.naive import expand, naive_walk, random_levels, random_parents
from vllm_eagle3.tree.mask import chain_parents
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.types import Acceptance
from vllm_eagle3.tree.verify import verify

#        0
#    1       2        tokens: node i carries 10 + i
#  3   4     5
#            6
PARENTS = [-1, 0, 0, 1, 1, 2, 5]


def walk(target, draft, parents, num_nodes=None) -> Acceptance:
    return verify(
        torch.tensor([target]),
        torch.tensor([draft]),
        torch.tensor([parents], dtype=torch.int32),
        torch.tensor([num_nodes or len(parents)], dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("target", "path", "emitted"),
    [
        ([99, 0, 0, 0, 0, 0, 0], [0], [99]),  # nothing accepted, the bonus token alone
        ([11, 99, 0, 0, 0, 0, 0], [0, 1], [11, 99]),
        ([11, 14, 0, 0, 99, 0, 0], [0, 1, 4], [11, 14, 99]),  # up to a leaf
        ([12, 0, 15, 0, 0, 16, 99], [0, 2, 5, 6], [12, 15, 16, 99]),
        ([12, 0, 13, 0, 0, 0, 0], [0, 2], [12, 13]),  # 13 is a child of another node
        ([15, 0, 0, 0, 0, 0, 0], [0], [15]),  # 15 is no child of the root
    ],
)
def test_hand_worked_example(target, path, emitted):
    acceptance = walk(target, [0, 11, 12, 13, 14, 15, 16], PARENTS)
    rest = [0] * (7 - len(path))
    assert acceptance.path_len_B.tolist() == [len(path)]
    assert acceptance.path_BN.tolist() == [path + rest]
    assert acceptance.tokens_BN.tolist() == [emitted + rest]


def test_the_lowest_of_equal_children_is_taken():
    acceptance = walk([5, 7, 8, 9], [0, 5, 5, 5], [-1, 0, 0, 0])
    assert acceptance.path_BN.tolist() == [[0, 1, 0, 0]]
    assert acceptance.tokens_BN.tolist() == [[5, 7, 0, 0]]


def test_detached_nodes_and_the_root_are_never_accepted():
    parents = chain_parents(5, length=2).tolist()
    assert walk([5] * 5, [5] * 5, parents).path_BN.tolist() == [[0, 1, 2, 0, 0]]
    parents = chain_parents(5, length=0).tolist()
    assert walk([5] * 5, [5] * 5, parents).path_len_B.tolist() == [1]


def test_a_chain_accepts_the_longest_common_prefix():
    parents = chain_parents(6, length=5).tolist()
    acceptance = walk([1, 2, 3, 9, 5, 6], [0, 1, 2, 3, 4, 5], parents)
    assert acceptance.path_BN.tolist() == [[0, 1, 2, 3, 0, 0]]
    assert acceptance.tokens_BN.tolist() == [[1, 2, 3, 9, 0, 0]]


def random_batch(seed: int, batch: int, num_nodes: int) -> tuple[torch.Tensor, ...]:
    """Target tokens, draft tokens and parents, with few tokens so that walks are long."""
    rng = random.Random(seed)
    vocab = rng.choice([1, 2, 3])
    parents = [random_parents(rng, num_nodes, rng.choice([0, 0.2])) for _ in range(batch)]
    generator = torch.Generator().manual_seed(seed)
    target_BN, draft_BN = torch.randint(vocab, (2, batch, num_nodes), generator=generator)
    return target_BN, draft_BN, torch.tensor(parents, dtype=torch.int32)


@pytest.mark.parametrize("num_nodes", [1, 2, 7, 33, 64])
@pytest.mark.parametrize("seed", range(6))
def test_equals_a_recursive_walk_for_trees_trimmed_anywhere(num_nodes, seed):
    batch = 40
    target_BN, draft_BN, parents_BN = random_batch(seed, batch, num_nodes)
    num_nodes_B = torch.randint(1, num_nodes + 1, (batch,), dtype=torch.int32)
    acceptance = verify(target_BN, draft_BN, parents_BN, num_nodes_B)
    assert acceptance.path_BN.dtype == acceptance.path_len_B.dtype == torch.int32
    assert acceptance.tokens_BN.dtype == torch.int64
    for request in range(batch):
        target = target_BN[request].tolist()
        path = naive_walk(
            target,
            draft_BN[request].tolist(),
            parents_BN[request].tolist(),
            int(num_nodes_B[request]),
        )
        rest = [0] * (num_nodes - len(path))
        assert acceptance.path_len_B[request] == len(path)
        assert acceptance.path_BN[request].tolist() == path + rest
        assert acceptance.tokens_BN[request].tolist() == [target[node] for node in path] + rest


def test_a_tree_trimmed_to_any_length_is_the_tree_of_that_length():
    target_BN, draft_BN, parents_BN = random_batch(seed=3, batch=50, num_nodes=24)
    for length in range(1, 25):
        trimmed = verify(target_BN, draft_BN, parents_BN, torch.full((50,), length))
        short = verify(
            target_BN[:, :length],
            draft_BN[:, :length],
            parents_BN[:, :length],
            torch.full((50,), length),
        )
        assert torch.equal(trimmed.path_len_B, short.path_len_B)
        assert torch.equal(trimmed.path_BN[:, :length], short.path_BN)
        assert torch.equal(trimmed.tokens_BN[:, :length], short.tokens_BN)
        assert not trimmed.path_BN[:, length:].any()


def test_a_longer_tree_never_accepts_less():
    levels = random_levels(seed=8, batch=64, depth=5, top_k=4, vocab=5)
    tree = rerank(expand(levels), 64)
    generator = torch.Generator().manual_seed(0)
    target_BN = torch.randint(5, (64, 64), generator=generator)
    accepted_NB = torch.stack(
        [
            verify(target_BN, tree.tokens_BN, tree.parents_BN, torch.full((64,), n)).path_len_B
            for n in range(1, 65)
        ]
    )
    assert (accepted_NB.diff(dim=0) >= 0).all()
    assert accepted_NB[-1].max() >= 5


def test_a_known_depth_changes_nothing():
    levels = random_levels(seed=9, batch=32, depth=4, top_k=3, vocab=3)
    tree = rerank(expand(levels), 31)
    target_BN = torch.randint(3, (32, 31), generator=torch.Generator().manual_seed(1))
    arguments = (target_BN, tree.tokens_BN, tree.parents_BN, torch.full((32,), 31))
    plain, bounded = verify(*arguments), verify(*arguments, max_depth=4)
    assert plain.path_len_B.max() == 5
    for field in ("path_BN", "path_len_B", "tokens_BN"):
        assert torch.equal(getattr(plain, field), getattr(bounded, field))
