"""The tree algorithm once more, in lists and loops: what tests/tree compares with."""

import random
from dataclasses import dataclass

import torch

from vllm_eagle3.tree.expand import Expansion, grow, start
from vllm_eagle3.tree.types import NO_PARENT


@dataclass
class Candidate:
    token: int
    score: float
    parent: int  # pool index, or NO_PARENT


Levels = list[tuple[torch.Tensor, torch.Tensor]]  # (log-probs, tokens) of each level


def random_levels(
    seed: int, batch: int, depth: int, top_k: int, vocab: int = 50, step: float | None = None
) -> Levels:
    """Drafts for each level: ``[B, K]`` and then ``[B, K, K]``.

    Args:
        step: round log-probabilities to multiples of this, which makes many ties.
    """
    generator = torch.Generator().manual_seed(seed)

    def level(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = 2 * torch.randn(*shape, vocab, generator=generator)
        log_probs, tokens = logits.log_softmax(-1).topk(top_k)
        if step is not None:
            log_probs = (log_probs / step).round() * step
        return log_probs, tokens

    return [level(batch), *(level(batch, top_k) for _ in range(depth - 1))]


def expand(levels: Levels) -> Expansion:
    expansion = start(*levels[0])
    for level in levels[1:]:
        expansion = grow(expansion, *level)
    return expansion


def naive_pool(levels: Levels, request: int) -> list[Candidate]:
    """The pool of one request; scores are float32 sums, as in the package."""
    log_probs, tokens = levels[0]
    pool = [
        Candidate(token, score, NO_PARENT)
        for token, score in zip(tokens[request].tolist(), log_probs[request].tolist(), strict=True)
    ]
    frontier = list(range(len(pool)))
    for log_probs, tokens in levels[1:]:
        first_new = len(pool)
        for row, parent in enumerate(frontier):
            for child in range(len(frontier)):
                score = torch.tensor(pool[parent].score) + log_probs[request, row, child]
                pool.append(Candidate(int(tokens[request, row, child]), score.item(), parent))
        new = range(first_new, len(pool))
        frontier = sorted(new, key=lambda index: (-pool[index].score, index))[: len(frontier)]
    return pool


def naive_rerank(pool: list[Candidate], num_nodes: int) -> list[int]:
    """Pool indices of the nodes below the root."""
    order = sorted(range(len(pool)), key=lambda index: (-pool[index].score, index))
    return order[: num_nodes - 1]


def naive_ancestors(parents: list[int], node: int) -> set[int]:
    """Self, ancestors and the root."""
    return {node} if node == 0 else {node} | naive_ancestors(parents, max(parents[node], 0))


def naive_walk(
    target: list[int], draft: list[int], parents: list[int], num_nodes: int, node: int = 0
) -> list[int]:
    """The accepted path from ``node`` on."""
    for child in range(1, num_nodes):
        if parents[child] == node and draft[child] == target[node]:
            return [node, *naive_walk(target, draft, parents, num_nodes, child)]
    return [node]


def random_parents(rng: random.Random, num_nodes: int, detached: float = 0.0) -> list[int]:
    """Any tree with ``parent[i] < i``, with detached nodes at the given rate."""
    return [NO_PARENT] + [
        NO_PARENT if rng.random() < detached else rng.randrange(node)
        for node in range(1, num_nodes)
    ]
