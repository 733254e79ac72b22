"""A static tree is what a walk along its paths finds, whatever the scores."""

import itertools
import random

import pytest
import torch

from tests.tree.naive import Levels, random_levels
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.paths import Path
from vllm_eagle3.tree.chain import best_chain
from vllm_eagle3.tree.expand import grow, start
from vllm_eagle3.tree.mask import bits_to_mask
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.static import StaticTree
from vllm_eagle3.tree.types import DraftTree

BATCH = 2


def random_config(seed: int) -> TreeConfig:
    """Any tree that a list of paths can say, nodes in any order that it allows."""
    rng = random.Random(seed)
    paths: list[Path] = []
    for _ in range(rng.randrange(1, 30)):
        parent = rng.choice([(), *(path for path in paths if len(path) < 5)])
        paths.append((*parent, sum(path[:-1] == parent for path in paths)))
    return TreeConfig.static(paths, verify_budget=None)


CONFIGS = [
    TreeConfig.static("mc_sim_7b_63"),
    TreeConfig.static([[0]]),
    TreeConfig.static([[0], [0, 0], [0, 0, 0]]),
    TreeConfig.static([[rank] for rank in range(9)]),
    *(random_config(seed) for seed in range(12)),
]


def unique_levels(config: TreeConfig) -> Levels:
    """Drafts of which every token is another, so that a token tells where it was offered."""
    count = itertools.count()
    levels = random_levels(config.num_nodes, BATCH, config.depth, config.top_k)
    return [
        (log_probs, torch.tensor([next(count) for _ in tokens.flatten()]).view(tokens.shape))
        for log_probs, tokens in levels
    ]


def draft(
    config: TreeConfig, levels: Levels, depth: int
) -> tuple[DraftTree, list[dict[Path, tuple[int, float]]]]:
    """The tree, and token and score of every path that was offered, found one by one."""
    static = StaticTree.of(config)
    expansion = start(*levels[0], static.frontier(1))
    offered: list[dict[int, tuple[Path, float]]] = [
        {token: ((rank,), score) for rank, (score, token) in enumerate(zip(*rows, strict=True))}
        for rows in zip(levels[0][0].tolist(), levels[0][1].tolist(), strict=True)
    ]
    for level, (log_probs, tokens) in enumerate(levels[1:depth], start=2):
        for request, known in enumerate(offered):
            for row, parent in enumerate(expansion.frontier_tokens_BK[request].tolist()):
                path, score = known[parent]
                for rank, token in enumerate(tokens[request, row].tolist()):
                    known[token] = (*path, rank), score + float(log_probs[request, row, rank])
        expansion = grow(expansion, log_probs, tokens, static.frontier(level))
    kept_M = static.kept(depth)
    tree = rerank(expansion, len(kept_M) + 1, kept_M=kept_M)
    by_path = [
        {path: (token, score) for token, (path, score) in known.items()} for known in offered
    ]
    return tree, by_path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.num_nodes))
def test_the_nodes_are_those_of_the_paths(config):
    tree, by_path = draft(config, unique_levels(config), config.depth)
    node = {path: index for index, path in enumerate(config.paths, start=1)} | {(): 0}
    for request, known in enumerate(by_path):
        tokens, scores = zip(*(known[path] for path in config.paths), strict=True)
        assert tree.tokens_BN[request, 1:].tolist() == list(tokens)
        torch.testing.assert_close(tree.scores_BN[request, 1:], torch.tensor(scores))
        parents = [node[path[:-1]] for path in config.paths]
        assert tree.parents_BN[request].tolist() == [-1, *parents]
        assert tree.depths_BN[request].tolist() == [0, *map(len, config.paths)]
        seen_NN = bits_to_mask(tree.ancestor_bits_BN[request], config.num_nodes)
        for path in config.paths:
            above = {node[path[:length]] for length in range(len(path) + 1)}
            assert set(seen_NN[node[path]].nonzero()[:, 0].tolist()) == above


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.num_nodes))
def test_a_round_that_ends_early_keeps_the_paths_before_the_first_deeper_one(config):
    levels = unique_levels(config)
    whole, _ = draft(config, levels, config.depth)
    for depth in range(1, config.depth):
        tree, _ = draft(config, levels, depth)
        count = tree.tokens_BN.shape[1]
        assert list(map(len, config.paths[:count]))[-1] == depth + 1
        assert torch.equal(tree.tokens_BN, whole.tokens_BN[:, :count])
        assert torch.equal(tree.parents_BN, whole.parents_BN[:, :count])


def test_the_chain_inside_is_that_of_the_best_children():
    config = TreeConfig.static([[0], [1], [1, 0], [0, 0], [0, 1], [0, 0, 0]])
    tree, by_path = draft(config, unique_levels(config), config.depth)
    chain = best_chain(tree, depth=3)
    for request, known in enumerate(by_path):
        tokens = [known[(0,) * length][0] for length in (1, 2, 3)]
        assert chain.tokens_BN[request].tolist() == [0, *tokens, 0, 0, 0]


def test_no_step_reads_a_value():
    """As tests/tree/test_static_shapes.py has it: tensors of the meta device hold none."""
    config = TreeConfig.static("mc_sim_7b_63")
    levels = [(p.to("meta"), t.to("meta")) for p, t in unique_levels(config)]
    static = StaticTree.of(config, "meta")
    expansion = start(*levels[0], static.frontier(1))
    for level, children in enumerate(levels[1:], start=2):
        expansion = grow(expansion, *children, static.frontier(level))
    tree = rerank(expansion, config.num_nodes, kept_M=static.kept(config.depth))
    assert all(value.is_meta for value in vars(tree).values())
