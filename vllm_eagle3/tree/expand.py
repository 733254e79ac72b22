"""Expansion of the draft tree, level by level.

Source: EAGLE-2 (arXiv 2406.16858), section 4.1. The score of a node is the log-probability
that the draft gives to its path from the root. Each level, the draft runs over the
frontier; every frontier node offers its K best children to the pool of candidates; the
best K of these children are the next frontier.

    start    the root's K best children            pool K
    grow     K x K children of the frontier        pool K + (level - 1) * K * K

Which candidates go on can be fixed beforehand instead (:mod:`~vllm_eagle3.tree.static`).
Every step is a fixed sequence of tensor operations: no shape depends on data, and nothing
waits for the device.
"""

from dataclasses import dataclass

import torch

from vllm_eagle3.tree.types import NO_PARENT


@dataclass(frozen=True)
class Expansion:
    """The candidates so far, and the frontier: the nodes that the draft runs over next.

    Attributes:
        tokens_BC: int64 tokens of the candidates, in the order in which they were offered.
        scores_BC: float32 log-probabilities of their paths from the root.
        parents_BC: int32 pool index of the parent candidate; ``NO_PARENT`` below the root.
        frontier_tokens_BK: int64.
        frontier_scores_BK: float32, falling unless the frontier is fixed.
        frontier_index_BK: int64 pool index.
        frontier_parent_BK: int64 position of the parent in the frontier before this one:
            which of the last forward's K rows holds its state; zeros at level 1.
        frontier_bits_BK: int64 ancestor bits over the *expanded* nodes (frontier node k of
            level d is number ``(d - 1) * K + k``), self included, root excluded: what the
            draft's tree attention lets the node see beside the prefix. Numbers from 64 on
            have no bit: such a frontier can be offered to the pool, but not expanded.
        level: depth of the frontier below the root, from 1.
    """

    tokens_BC: torch.Tensor
    scores_BC: torch.Tensor
    parents_BC: torch.Tensor
    frontier_tokens_BK: torch.Tensor
    frontier_scores_BK: torch.Tensor
    frontier_index_BK: torch.Tensor
    frontier_parent_BK: torch.Tensor
    frontier_bits_BK: torch.Tensor
    level: int

    @property
    def top_k(self) -> int:
        """Children for each expanded node, and the width of the frontier (K)."""
        return self.frontier_tokens_BK.shape[1]


def start(
    log_probs_BK: torch.Tensor, tokens_BK: torch.Tensor, frontier_K: torch.Tensor | None = None
) -> Expansion:
    """Offer the root's K best children; all of them are the first frontier.

    Args:
        log_probs_BK: float, falling: the K largest of the root's log-softmax.
        tokens_BK: integer, the tokens they belong to.
        frontier_K: int64, the order in which they are the frontier; the best first if None.
    """
    scores_BK = _log_probability(log_probs_BK)
    tokens_BK = tokens_BK.to(torch.int64)
    number_K = torch.arange(tokens_BK.shape[1], device=tokens_BK.device)
    index_BK = (number_K if frontier_K is None else frontier_K).expand_as(tokens_BK)
    return Expansion(
        tokens_BC=tokens_BK,
        scores_BC=scores_BK,
        parents_BC=torch.full_like(tokens_BK, NO_PARENT, dtype=torch.int32),
        frontier_tokens_BK=tokens_BK.gather(1, index_BK),
        frontier_scores_BK=scores_BK.gather(1, index_BK),
        frontier_index_BK=index_BK,
        frontier_parent_BK=torch.zeros_like(tokens_BK),
        frontier_bits_BK=_own_bit(number_K).expand_as(tokens_BK),
        level=1,
    )


def grow(
    expansion: Expansion,
    log_probs_BKK: torch.Tensor,
    tokens_BKK: torch.Tensor,
    frontier_K: torch.Tensor | None = None,
) -> Expansion:
    """Offer the K best children of each frontier node; the best K of them are the next.

    Ties go to the candidate that was offered first.

    Args:
        log_probs_BKK: float, falling in the last dimension: for each frontier node the K
            largest of its log-softmax.
        tokens_BKK: integer, the tokens they belong to.
        frontier_K: int64, which of the K * K are the next instead, whatever their scores.
    """
    K = expansion.top_k
    parent_scores_BK1 = expansion.frontier_scores_BK.unsqueeze(2)
    # [B, K * K], in the order in which they enter the pool.
    scores_BJ = (parent_scores_BK1 + _log_probability(log_probs_BKK)).flatten(1)
    tokens_BJ = tokens_BKK.to(torch.int64).flatten(1)
    parents_BJ = expansion.frontier_index_BK.to(torch.int32).repeat_interleave(K, dim=1)

    if frontier_K is None:
        best_BK = scores_BJ.sort(dim=1, descending=True, stable=True).indices[:, :K]
    else:
        best_BK = frontier_K.expand(scores_BJ.shape[0], -1)
    parent_BK = best_BK // K
    number_K = torch.arange(K, device=best_BK.device) + expansion.level * K
    inherited_BK = expansion.frontier_bits_BK.gather(1, parent_BK)
    return Expansion(
        tokens_BC=torch.cat([expansion.tokens_BC, tokens_BJ], dim=1),
        scores_BC=torch.cat([expansion.scores_BC, scores_BJ], dim=1),
        parents_BC=torch.cat([expansion.parents_BC, parents_BJ], dim=1),
        frontier_tokens_BK=tokens_BJ.gather(1, best_BK),
        frontier_scores_BK=scores_BJ.gather(1, best_BK),
        frontier_index_BK=best_BK + expansion.tokens_BC.shape[1],
        frontier_parent_BK=parent_BK,
        frontier_bits_BK=inherited_BK | _own_bit(number_K),
        level=expansion.level + 1,
    )


def _log_probability(log_probs: torch.Tensor) -> torch.Tensor:
    """float32, never above 0 and never NaN.

    The reranking relies on scores that do not rise along a path. A fused softmax may round
    a certain token to just above 0, and rows of idle request slots may hold anything.
    """
    inf = float("inf")
    return log_probs.float().nan_to_num(nan=-inf, posinf=0.0, neginf=-inf).clamp(max=0.0)


def _own_bit(number: torch.Tensor) -> torch.Tensor:
    """``1 << number`` in 64 bits; 0 from 64 on."""
    bit = torch.ones_like(number) << number.clamp(max=63)
    return bit.where(number < 64, 0)
