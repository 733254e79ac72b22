"""The rounds of drafting in which a server would emit a document.

The first token of an answer comes from the prompt's own forward. It is the first root: a round
drafts below a root, the target verifies, and what it accepts and one token more are emitted; the
last of them is the next root. A round ends early where the answer does: at a token that ends a
turn, drafted or not, or at the server's limit of tokens. A draft that is accepted there spares
no forward, and so it counts nowhere here::

    tokens of a round = 1 + accepted drafts after each of which one more token is emitted

which makes tau (tokens of all rounds / rounds) what :mod:`vllm_eagle3.bench.tau` measures.

Shape suffixes: R rounds, D depth, T tokens of the document, N nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.train.drafting import DocumentDrafter
from vllm_eagle3.train.features import Target
from vllm_eagle3.train.scoring import accepted_of_document, path_probabilities
from vllm_eagle3.tree.types import DraftTree


@dataclass(frozen=True)
class Rounds:
    """All rounds of one document with one chain or tree, on the CPU.

    Attributes:
        roots_R: int64, the root's position: the document's tokens before it.
        emitted_R: int64, tokens of each round if the target draws the document.
        exceeds_TRD: by temperature float64 [R, D]: the probability that the round emits more
            than d tokens, d = 1..D. A row's sum is the expected number of tokens less one.
    """

    roots_R: torch.Tensor
    emitted_R: torch.Tensor
    exceeds_TRD: dict[float, torch.Tensor]


@torch.no_grad()
def rounds_of_document(
    target: Target,
    drafter: DocumentDrafter,
    assistant_T: torch.Tensor,
    config: TreeConfig,
    temperatures: Sequence[float],
    limit: int | None = None,
) -> Rounds | None:
    """Draft along a document, and score each tree where the server would have grown it.

    Args:
        drafter: has read the document.
        assistant_T: bool, what the server emitted.
        temperatures: of the target's sampling; 0 for greedy.
        limit: tokens at which the server would have cut the document; None for no limit.

    Returns:
        None if no answer is longer than one token.
    """
    tokens_T = drafter.tokens_T
    slots_S = _possible_roots(assistant_T)
    if not len(slots_S):
        return None
    ends_S = _turn_ends(assistant_T)[slots_S + 1]
    trees = drafter.trees(slots_S, config)
    accepted_S = accepted_of_document(tokens_T, slots_S, ends_S, trees)
    # Where a draft is the turn's last token, nothing follows it.
    emitted_S = torch.minimum(accepted_S + 1, ends_S - slots_S - 2)
    visited_R = torch.tensor(_walk(slots_S.tolist(), emitted_S.tolist()), device=slots_S.device)
    trees = DraftTree(*(value[visited_R] for value in vars(trees).values()))
    roots_R = slots_S[visited_R] + 1
    scores = path_probabilities(target, tokens_T, slots_S[visited_R], trees, temperatures)
    return Rounds(
        roots_R=roots_R.cpu(),
        emitted_R=emitted_S[visited_R].cpu(),
        exceeds_TRD={
            temperature: _by_depth(probs_RN, trees.depths_BN, config.depth, roots_R, limit).cpu()
            for temperature, probs_RN in zip(temperatures, scores, strict=True)
        },
    )


def _by_depth(
    probs_RN: torch.Tensor,
    depths_RN: torch.Tensor,
    depth: int,
    roots_R: torch.Tensor,
    limit: int | None,
) -> torch.Tensor:
    """Float64 [R, D]: one path is accepted, so the nodes of a depth exclude each other."""
    shares = torch.zeros(len(probs_RN), depth + 1, dtype=torch.float64, device=probs_RN.device)
    shares.scatter_add_(1, depths_RN.long(), probs_RN.double())
    if limit is not None:
        # More than d tokens: the last of them at position root + d + 1.
        last_RD = roots_R.unsqueeze(1) + torch.arange(depth + 1, device=roots_R.device) + 1
        shares = shares.masked_fill(last_RD >= limit, 0.0)
    return shares[:, 1:]


def _possible_roots(assistant_T: torch.Tensor) -> torch.Tensor:
    """Slots p whose root (token p+1) and next token (p+2) are the assistant's."""
    return (assistant_T[1:-1] & assistant_T[2:]).nonzero().squeeze(1)


def _turn_ends(assistant_T: torch.Tensor) -> torch.Tensor:
    """For each of the assistant's tokens the position behind its turn's last one, int64 [T]."""
    T = len(assistant_T)
    others_T = torch.arange(T, device=assistant_T.device).where(~assistant_T, T)
    return others_T.flip(0).cummin(0).values.flip(0)


def _walk(slots: list[int], emitted: list[int]) -> list[int]:
    """Indices of the roots that are drafted from, ``slots`` rising."""
    visited, beyond = [], -1
    for index, slot in enumerate(slots):
        if slot >= beyond:
            visited.append(index)
            beyond = slot + emitted[index]
    return visited
