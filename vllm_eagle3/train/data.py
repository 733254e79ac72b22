"""Documents to batches: right-padded, of similar length, within a token budget.

Padding on the right needs no attention mask: no slot of a document sees a later one, and
the loss skips padding. Documents are sorted by length within a shuffled window, which
keeps the padding low (a fifth, at 190 tokens a document), and the batches are shuffled again.
:mod:`vllm_eagle3.train.packing` makes rows without padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from vllm_eagle3.corpus import Document
from vllm_eagle3.train.documents import DocumentLayout

_WINDOW_BATCHES = 16
_LENGTH_MULTIPLE = 64  # few distinct shapes, whole tiles


@dataclass(frozen=True)
class CountedSlots:
    """The slots that count in the losses of draft steps k = 0, 1, ... of a batch of B x T = P.

    Attributes:
        at_M: int64, rising: k P + slot.
        sizes: how many count in each step.
    """

    at_M: torch.Tensor
    sizes: tuple[int, ...]


@dataclass
class TokenBatch:
    """Documents as rows of tokens.

    Attributes:
        tokens_BT: int64.
        assistant_BT: bool, False on padding.
        positions_BT: int64; of packed rows, restarting at 0 with each document. None for one
            document a row.
        slots: those that count in the loss; None where they have not been counted.
    """

    tokens_BT: torch.Tensor
    assistant_BT: torch.Tensor
    positions_BT: torch.Tensor | None = None
    slots: CountedSlots | None = None

    @cached_property
    def layout(self) -> DocumentLayout | None:
        """Where the documents lie; None for one document a row."""
        return None if self.positions_BT is None else DocumentLayout(self.positions_BT)

    def to(self, device: torch.device) -> "TokenBatch":
        """On another device, with its layout, in two transfers that the host does not wait for."""
        (assistant_BT,) = _moved([self.assistant_BT], device)
        numbers = [self.tokens_BT]
        if self.slots is not None:
            numbers.append(self.slots.at_M)
        if self.layout is not None:
            numbers += self.layout.indices
        tokens_BT, *numbers = _moved(numbers, device)
        batch = TokenBatch(tokens_BT, assistant_BT)
        if self.slots is not None:
            batch.slots = CountedSlots(numbers.pop(0), self.slots.sizes)
        if self.layout is not None:
            batch.layout = self.layout.with_indices(numbers)
            batch.positions_BT = batch.layout.positions_BT
        return batch


def _moved(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of one type, in one transfer."""
    flat = torch.cat([x.flatten() for x in tensors])
    if device.type == "cuda":
        flat = flat.pin_memory()  # from other memory the host would wait until it has left
    parts = flat.to(device, non_blocking=True).split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def split_held_out(
    documents: Sequence[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents; at least one of each.

    Raises:
        ValueError: fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError("training needs at least two documents: synthesise more data")
    order = np.random.default_rng(seed).permutation(len(documents))
    num_held_out = min(max(1, round(share * len(documents))), len(documents) - 1)
    held_out = [documents[i] for i in order[:num_held_out]]
    return [documents[i] for i in order[num_held_out:]], held_out


def drawn_share(documents: Sequence[Document], share: float) -> Sequence[Document]:
    """The first ones of documents in random order, as :func:`split_held_out` leaves them.

    Those of a smaller share are among those of a larger one; it is one document at least.
    """
    return documents[: max(1, round(share * len(documents)))]


def check_documents(
    documents: Sequence[Document], vocab_size: int, max_length: int, max_positions: int
) -> None:
    """Refuse what the target cannot read.

    Args:
        max_length: where documents are cut.
        max_positions: of the target.

    Raises:
        ValueError: a token id is outside of the target's vocabulary (another target's tokenizer
            wrote it), or a document is longer than the target's context.
    """
    longest = min(max_length, max(len(document.tokens) for document in documents))
    if longest > max_positions:
        raise ValueError(
            f"a document has {longest} tokens, the target's context ends at {max_positions}: give "
            f"--max-length {max_positions}, which cuts it"
        )
    highest = max(int(document.tokens.max(initial=0)) for document in documents)
    if highest >= vocab_size:
        raise ValueError(
            f"the data holds token {highest}, the target's vocabulary ends at {vocab_size - 1}: "
            "it was written for another target"
        )


def epoch_batches(
    documents: Sequence[Document], batch_tokens: int, max_length: int, seed: int
) -> Iterator[TokenBatch]:
    """All documents once, in an order that ``seed`` fixes.

    Args:
        batch_tokens: most tokens of a batch, padding included; a longer document is a batch by
            itself, uncut.
        max_length: longer documents are cut.
    """
    rng = np.random.default_rng(seed)
    lengths = np.array([min(len(d.tokens), max_length) for d in documents])
    max_length = min(max_length, max(batch_tokens, int(lengths.max())))  # padding included
    order = rng.permutation(len(documents))
    window = max(1, int(_WINDOW_BATCHES * batch_tokens / lengths.mean()))
    groups: list[np.ndarray] = []
    waiting = order[:0]
    for start in range(0, len(order), window):
        part = np.concatenate((waiting, order[start : start + window]))
        part = part[np.argsort(-lengths[part], kind="stable")]
        # The last batch may be small, and yet a step: its documents wait for the next window.
        *whole, waiting = cut_batches(part, lengths, batch_tokens)
        groups += whole
    groups.append(waiting)
    for group in rng.permutation(len(groups)):
        yield pad_documents([documents[i] for i in groups[group]], max_length)


def cut_batches(
    longest_first: np.ndarray, lengths: np.ndarray, batch_tokens: int
) -> list[np.ndarray]:
    """Part an order of documents, by their numbers, into batches.

    Args:
        lengths: of all documents, by number.
        batch_tokens: as in :func:`epoch_batches`.
    """
    groups, start = [], 0
    while start < len(longest_first):
        rows = max(1, batch_tokens // _padded(lengths[longest_first[start]]))
        groups.append(longest_first[start : start + rows])
        start += rows
    return groups


def _padded(length: int) -> int:
    return -(-int(length) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def pad_documents(documents: Sequence[Document], max_length: int) -> TokenBatch:
    """One document a row; longer ones are cut."""
    width = min(_padded(max(len(d.tokens) for d in documents)), max_length)
    tokens_BT = np.zeros((len(documents), width), dtype=np.int64)
    assistant_BT = np.zeros((len(documents), width), dtype=bool)
    for row, document in enumerate(documents):
        length = min(len(document.tokens), width)
        tokens_BT[row, :length] = document.tokens[:length]
        assistant_BT[row, :length] = document.assistant[:length]
    return TokenBatch(torch.from_numpy(tokens_BT), torch.from_numpy(assistant_BT))
