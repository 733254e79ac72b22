"""The rounds of drafting in which a server would emit documents.

The first token of an answer comes from the prompt's own forward. It is the first root: a round
drafts below a root, the target verifies, and what it accepts and one token more are emitted; the
last of them is the next root. A round ends early where the answer does: at a token that ends a
turn, drafted or not, or at the server's limit of tokens. A draft that is accepted there spares
no forward, and so it counts nowhere here::

    tokens of a round = 1 + accepted drafts after each of which one more token is emitted

which makes tau (tokens of all rounds / rounds) what :mod:`vllm_eagle3.bench.tau` measures.

Which roots the server drafts from depends on what it accepts, so the head drafts from all of
them at once; the target scores the trees of those that are reached.

Shape suffixes: B documents, R roots, D depth, T tokens of a document, N nodes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.corpus import Document
from vllm_eagle3.train.data import cut_batches, pad_documents
from vllm_eagle3.train.drafting import DocumentDrafter
from vllm_eagle3.train.features import Target
from vllm_eagle3.train.model import DraftHead
from vllm_eagle3.train.scoring import accepted_of_documents, path_probabilities
from vllm_eagle3.tree.types import DraftTree

_BATCH_TOKENS = 16384  # padding included; of each the target's keys and values are kept
_UNLIMITED = 1 << 62


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


def batches_to_replay(documents: Sequence[Document]) -> Iterator[np.ndarray]:
    """Numbers of documents that one :class:`Replay` holds, of similar lengths."""
    lengths = np.array([len(document.tokens) for document in documents])
    yield from cut_batches(np.argsort(-lengths, kind="stable"), lengths, _BATCH_TOKENS)


class Replay:
    """Documents that target and head have read, to be drafted along with any chain or tree.

    Args:
        documents: what the server read and, marked as the assistant's, emitted.
    """

    def __init__(self, target: Target, head: DraftHead, documents: Sequence[Document]) -> None:
        self._target, self._documents = target, documents
        batch = pad_documents(documents, max(len(document.tokens) for document in documents))
        self._states = target.read_documents(batch.tokens_BT.to(head.d2t.device))
        self._drafter = DocumentDrafter(head, self._states.tokens_BT, self._states.features_BTF)

    @torch.no_grad()
    def rounds(
        self,
        config: TreeConfig,
        temperatures: Sequence[float],
        limits: Sequence[int] | None = None,
    ) -> list[Rounds | None]:
        """Draft along the documents, and score each tree where the server would have grown it.

        Args:
            temperatures: of the target's sampling; 0 for greedy.
            limits: tokens at which the server would have cut each document; None for no limits.

        Returns:
            For each document its rounds; None if no answer of it is longer than one token.
        """
        roots = self._possible_roots()
        if not roots.shape[1]:
            return [None for _ in self._documents]
        device = self._states.tokens_BT.device
        on_device = roots.to(device)
        trees = self._drafter.trees(*on_device[:2], config)
        emitted_R = self._emitted(*on_device, trees, config.depth).cpu()
        # One row of places for all documents: no round goes beyond its own.
        places_R = roots[0] * self._states.tokens_BT.shape[1] + roots[1]
        reached = torch.tensor(_walk(places_R.tolist(), emitted_R.tolist()))

        at = reached.to(device)
        trees = DraftTree(*(value[at] for value in vars(trees).values()))
        documents_R, slots_R, _ = on_device[:, at]
        scores = path_probabilities(
            self._target, self._states, documents_R, slots_R, trees, temperatures
        )
        limits_B = torch.tensor(limits or [_UNLIMITED] * len(self._documents), device=device)
        cut = trees.depths_BN, config.depth, slots_R + 1, limits_B[documents_R]
        exceeds_TRD = torch.stack([_by_depth(probs_RN, *cut) for probs_RN in scores]).cpu()
        return self._by_document(roots[:, reached], emitted_R[reached], exceeds_TRD, temperatures)

    def _emitted(self, documents_R, slots_R, ends_R, trees, depth) -> torch.Tensor:
        """Tokens of a round below each root, int64 [R]."""
        accepted_R = accepted_of_documents(
            self._states.tokens_BT, documents_R, slots_R, ends_R, trees, depth
        )
        # Where a draft is the turn's last token, nothing follows it.
        return torch.minimum(accepted_R + 1, ends_R - slots_R - 2)

    def _by_document(self, roots, emitted_R, exceeds_TRD, temperatures) -> list[Rounds | None]:
        counts = roots[0].bincount(minlength=len(self._documents)).tolist()
        columns = zip(
            (roots[1] + 1).split(counts),
            emitted_R.split(counts),
            exceeds_TRD.split(counts, 1),
            strict=True,
        )
        return [
            Rounds(roots_R, emitted, dict(zip(temperatures, exceeds, strict=True)))
            if len(roots_R)
            else None
            for roots_R, emitted, exceeds in columns
        ]

    def _possible_roots(self) -> torch.Tensor:
        """Document, slot and end of the turn of every root, int64 [3, R], on the CPU.

        The root is the token after the slot; it and the token after it are the assistant's.
        """
        found = []
        for number, document in enumerate(self._documents):
            slots = np.flatnonzero(document.assistant[1:-1] & document.assistant[2:])
            ends = _turn_ends(document.assistant)[slots + 1]
            found.append(np.stack((np.full_like(slots, number), slots, ends)))
        return torch.from_numpy(np.concatenate(found, 1))


def _by_depth(
    probs_RN: torch.Tensor,
    depths_RN: torch.Tensor,
    depth: int,
    roots_R: torch.Tensor,
    limits_R: torch.Tensor,
) -> torch.Tensor:
    """Float64 [R, D]: one path is accepted, so the nodes of a depth exclude each other."""
    shares = torch.zeros(len(probs_RN), depth + 1, dtype=torch.float64, device=probs_RN.device)
    shares.scatter_add_(1, depths_RN.long(), probs_RN.double())
    # More than d tokens: the last of them at position root + d + 1.
    last_RD = roots_R.unsqueeze(1) + torch.arange(depth + 1, device=roots_R.device) + 1
    return shares.masked_fill(last_RD >= limits_R.unsqueeze(1), 0.0)[:, 1:]


def _turn_ends(assistant_T: np.ndarray) -> np.ndarray:
    """For each of the assistant's tokens the position behind its turn's last one, int64 [T]."""
    T = len(assistant_T)
    others_T = np.where(assistant_T, T, np.arange(T))
    return np.minimum.accumulate(others_T[::-1])[::-1]


def _walk(places: list[int], emitted: list[int]) -> list[int]:
    """Indices of the roots that are drafted from, ``places`` rising."""
    visited, beyond = [], -1
    for index, place in enumerate(places):
        if place >= beyond:
            visited.append(index)
            beyond = place + emitted[index]
    return visited
