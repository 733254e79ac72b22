"""Sampled verification keeps the target's distribution: EAGLE's claim, tested as such.

The target is a Markov chain over 16 tokens, sharp enough for drafts to be accepted and
with tokens that it never emits. The draft is another chain, with a tree for each root. All
that is emitted must be distributed as plain sampling, at every position and for every pair
of neighbours (which is all there is to know about a Markov chain).
"""

from collections.abc import Callable

import pytest
import torch

from tests.chi_square import chi_square, count_pairs, count_tokens, is_drawn_from
from tests.tree.naive import expand
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.types import Acceptance, DraftTree
from vllm_eagle3.tree.verify import sample_walk, verify

V = 16
TRIALS = 200_000
LENGTH = 5  # emitted positions that are tested

Sampler = Callable[[torch.Tensor, DraftTree, torch.Generator], Acceptance]


def markov_chain(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(V, V, generator=generator)).softmax(-1)


TARGET = markov_chain(0)
TARGET = TARGET * (TARGET > 0.004)
TARGET = TARGET / TARGET.sum(-1, keepdim=True)
# A draft that knows the target somewhat.
DRAFT = 0.5 * TARGET + 0.5 * markov_chain(1)


def draft_trees(depth: int = 3, top_k: int = 3, num_nodes: int = 10) -> DraftTree:
    """The tree below each of the V tokens."""
    best_V = DRAFT.log().topk(top_k)
    levels = [(best_V.values, best_V.indices)]
    for _ in range(depth - 1):
        # The expansion decides its frontier, so ask it for the tokens to continue.
        frontier_BK = expand(levels).frontier_tokens_BK
        levels.append((best_V.values[frontier_BK], best_V.indices[frontier_BK]))
    return rerank(expand(levels), num_nodes, torch.arange(V))


TREES = draft_trees()


def generate(sampler: Sampler, seed: int, trials: int = TRIALS) -> tuple[torch.Tensor, float]:
    """LENGTH tokens of each trial, all after token 0, and the mean acceptance length."""
    generator = torch.Generator().manual_seed(seed)
    num_nodes = TREES.tokens_BN.shape[1]
    tokens = torch.zeros(trials, LENGTH + num_nodes, dtype=torch.int64)
    length = torch.zeros(trials, dtype=torch.int64)
    root = torch.zeros(trials, dtype=torch.int64)
    rounds = emitted = 0
    while (running := (length < LENGTH).nonzero().flatten()).numel():
        tree = DraftTree(*(field[root[running]] for field in vars(TREES).values()))
        acceptance = sampler(TARGET[tree.tokens_BN], tree, generator)
        places = length[running, None] + torch.arange(num_nodes)
        tokens[running[:, None], places] = acceptance.tokens_BN
        length[running] += acceptance.path_len_B
        root[running] = tokens[running, length[running] - 1]
        rounds += running.numel()
        emitted += int(acceptance.path_len_B.sum())
    return tokens[:, :LENGTH], emitted / rounds


def is_lossless(tokens: torch.Tensor) -> bool:
    probs_V = TARGET[0]
    passed = is_drawn_from(count_tokens(tokens[:, 0], V), probs_V)
    for place in range(1, LENGTH):
        pairs = count_pairs(tokens[:, place - 1], tokens[:, place], V)
        passed &= is_drawn_from(pairs, probs_V[:, None] * TARGET)
        probs_V = probs_V @ TARGET
        passed &= is_drawn_from(count_tokens(tokens[:, place], V), probs_V)
    return passed


def walk_of_the_package(probs_BNV, tree, generator) -> Acceptance:
    num_nodes_B = torch.full((len(probs_BNV),), probs_BNV.shape[1])
    return sample_walk(probs_BNV, tree.tokens_BN, tree.parents_BN, num_nodes_B, generator)


def walk_of_trimmed_trees(probs_BNV, tree, generator) -> Acceptance:
    num_nodes_B = torch.arange(len(probs_BNV)) % probs_BNV.shape[1] + 1
    return sample_walk(probs_BNV, tree.tokens_BN, tree.parents_BN, num_nodes_B, generator)


def one_noise_for_all_nodes(probs_BNV, tree, generator) -> Acceptance:
    """Wrong: the second token is drawn with the noise that already chose the first."""
    noise_B11 = torch.rand(len(probs_BNV), 1, 1, generator=generator)
    tokens_BN = (probs_BNV.cumsum(-1) < noise_B11).sum(-1).clamp(max=V - 1)
    num_nodes_B = torch.full((len(probs_BNV),), probs_BNV.shape[1])
    return verify(tokens_BN, tree.tokens_BN, tree.parents_BN, num_nodes_B)


def a_second_chance(probs_BNV, tree, generator) -> Acceptance:
    """Wrong: a token that no child carries is drawn again before it becomes the bonus."""
    num_nodes_B = torch.full((len(probs_BNV),), probs_BNV.shape[1])
    first, second = (
        torch.multinomial(probs_BNV.flatten(0, 1), 2, replacement=True, generator=generator)
        .view(*probs_BNV.shape[:2], 2)
        .unbind(-1)
    )
    node_BNN = tree.parents_BN.unsqueeze(1) == torch.arange(probs_BNV.shape[1])[:, None]
    carried_BNN = node_BNN & (tree.tokens_BN.unsqueeze(1) == first.unsqueeze(2))
    tokens_BN = first.where(carried_BNN.any(-1), second)
    return verify(tokens_BN, tree.tokens_BN, tree.parents_BN, num_nodes_B)


def bonus_from_unprocessed_logits(probs_BNV, tree, generator) -> Acceptance:
    """Wrong: where nothing is accepted, the token comes from another temperature."""
    accepted = walk_of_the_package(probs_BNV, tree, generator)
    warm_BV = probs_BNV[:, 0].sqrt()
    warm_B = torch.multinomial(warm_BV, 1, generator=generator).squeeze(1)
    alone_B = accepted.path_len_B == 1
    accepted.tokens_BN[:, 0] = warm_B.where(alone_B, accepted.tokens_BN[:, 0])
    return accepted


@pytest.mark.parametrize("sampler", [walk_of_the_package, walk_of_trimmed_trees])
def test_emitted_tokens_are_distributed_as_without_drafts(sampler):
    tokens, tau = generate(sampler, seed=11)
    assert tau > 1.5  # drafts are accepted, or the test shows nothing
    assert is_lossless(tokens)


@pytest.mark.parametrize(
    "sampler", [one_noise_for_all_nodes, a_second_chance, bonus_from_unprocessed_logits]
)
def test_known_mistakes_are_found(sampler):
    tokens, _ = generate(sampler, seed=11)
    assert not is_lossless(tokens)


def test_draws_follow_the_generator():
    first, second, other = (generate(walk_of_the_package, seed, 500)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


class TestChiSquare:
    def test_of_a_known_table(self):
        # (44-50)^2/50 + (56-50)^2/50
        assert chi_square(torch.tensor([44, 56]), torch.tensor([0.5, 0.5])) == (1.44, 1)

    def test_rare_outcomes_share_a_bin(self):
        probs_V = torch.tensor([0.6, 0.36, 0.02, 0.02], dtype=torch.float64)
        statistic, freedom = chi_square(torch.tensor([60, 30, 6, 4]), probs_V)
        # Even together the last two are expected 4 times, so that 0.36 joins them.
        assert freedom == 1
        assert statistic == pytest.approx(0)

    def test_an_impossible_outcome_is_never_passed(self):
        assert not is_drawn_from(torch.tensor([10**6, 1]), torch.tensor([1.0, 0.0]))

    def test_a_bias_of_one_per_cent_is_found_in_200_000_trials(self):
        probs_V = torch.full((V,), 1 / V)
        counts_V = torch.full((V,), TRIALS // V)
        assert is_drawn_from(counts_V, probs_V)
        counts_V[0] += 2000
        counts_V[1] -= 2000
        assert not is_drawn_from(counts_V, probs_V)

    def test_chance_alone_passes(self):
        generator = torch.Generator().manual_seed(0)
        for seed in range(20):
            probs_V = markov_chain(seed)[0]
            draws = torch.multinomial(probs_V, 20_000, replacement=True, generator=generator)
            assert is_drawn_from(count_tokens(draws, V), probs_V)
