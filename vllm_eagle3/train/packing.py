"""Several documents in a row, none of which sees another.

A packed batch has rows of one length and, in ``positions_BT``, positions that restart at 0 where
a document begins; a gap before the next one belongs to it, and what is left at a row's end is laid
out as further documents, of nothing.
All that works token by token (projections, MLP, output matrix) runs over the rows and reads no
padding. Where slots see each other, the documents are taken apart:

    target      Transformers makes the block-diagonal mask of restarting positions itself
    head        its queries, keys and values are copied into one right-padded row for each
                document, for the attention only, and the outputs back

The documents of a batch are within a factor of four in length, so that those copies are not
much larger than the batch: about 1.5 times, on documents of lognormal lengths.

Shape suffixes: B rows, T slots, P = B T, C documents of a batch, L slots of the longest.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from vllm_eagle3.corpus import Document
from vllm_eagle3.train.data import TokenBatch
from vllm_eagle3.train.layers import SelfAttention

_WINDOW_BATCHES = 32
_CLASS_FACTOR = 4
_SHORT = 64  # tokens; all shorter documents are of one class


def packed_batches(
    documents: Sequence[Document],
    batch_tokens: int,
    max_length: int,
    num_steps: int,
    seed: int,
) -> Iterator[TokenBatch]:
    """All documents once, packed, in an order that ``seed`` fixes.

    Args:
        batch_tokens: of a batch; the last ones of a window may hold fewer.
        max_length: of a row, and of a document: longer ones are cut.
        num_steps: draft steps; so far from a document's last token no other document has one
            of the assistant's, so that no slot counts across the two.
    """
    length = min(max_length, batch_tokens)
    rows_of_batch = batch_tokens // length
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(documents))
    sizes = np.array([min(len(d.tokens), length) for d in documents])
    window = max(1, int(_WINDOW_BATCHES * batch_tokens / sizes.mean()))
    batches: list[list[list[int]]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        longest_first = part[np.argsort(-sizes[part], kind="stable")]
        for alike in _classes(longest_first, sizes, length):
            rows = _first_fit([(i, documents[i]) for i in alike], length, num_steps)
            batches += [rows[i : i + rows_of_batch] for i in range(0, len(rows), rows_of_batch)]
    for index in rng.permutation(len(batches)):
        yield _lay_out([[documents[i] for i in row] for row in batches[index]], length, num_steps)


def _classes(longest_first: np.ndarray, sizes: np.ndarray, length: int) -> list[np.ndarray]:
    """Documents of more than 1/4, 1/16, ... of a row; none of these empty."""
    classes, rest, bound = [], longest_first, length // _CLASS_FACTOR
    while len(rest) and bound >= _SHORT:
        longer = int((sizes[rest] > bound).sum())
        classes.append(rest[:longer])
        rest, bound = rest[longer:], bound // _CLASS_FACTOR
    return [alike for alike in (*classes, rest) if len(alike)]


def _first_fit(
    documents: Sequence[tuple[int, Document]], length: int, num_steps: int
) -> list[list[int]]:
    """Each document into the first row with room for it."""
    rows: list[list[int]] = []
    room = np.zeros(len(documents), dtype=np.int64)
    for index, document in documents:
        size = min(len(document.tokens), length)
        gap = _gap(document, num_steps)
        fitting = np.flatnonzero(room[: len(rows)] >= size + gap)
        if len(fitting):
            row = int(fitting[0])
            room[row] -= size + gap
            rows[row].append(index)
        else:
            room[len(rows)] = length - size
            rows.append([index])
    return rows


def _gap(document: Document, num_steps: int) -> int:
    """Slots to leave free before a document: it may begin with what the assistant wrote."""
    written = np.flatnonzero(document.assistant[: num_steps + 1])
    return num_steps + 1 - int(written[0]) if len(written) else 0


def _lay_out(rows: Sequence[Sequence[Document]], length: int, num_steps: int) -> TokenBatch:
    shape = len(rows), length
    tokens_BT, positions_BT = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    assistant_BT = np.zeros(shape, dtype=bool)
    longest = min(length, max(len(d.tokens) for documents in rows for d in documents))
    for row, documents in enumerate(rows):
        end = 0
        for document in documents:
            start = end + (_gap(document, num_steps) if end else 0)
            end = min(start + len(document.tokens), length)
            tokens_BT[row, start:end] = document.tokens[: end - start]
            assistant_BT[row, start:end] = document.assistant[: end - start]
            # A first token is neither root nor prediction, but for a slot of the document before.
            assistant_BT[row, start] = False
            # The gap after it is this one's; the next document overwrites the rest.
            positions_BT[row, start : end + num_steps + 1] = np.arange(length)[
                : min(end + num_steps + 1, length) - start
            ]
        # Documents of nothing, none longer than the others: the head copies them all.
        positions_BT[row, end:] = np.arange(length - end) % longest
    return TokenBatch(*map(torch.from_numpy, (tokens_BT, assistant_BT, positions_BT)))


class Packing:
    """Lets a target and a head read packed batches.

    Outside of :meth:`of` both are what they were.
    """

    def __init__(self, target: nn.Module, head: nn.Module) -> None:
        """``target``: the Transformers model below its language-model head."""
        self._positions_BT: torch.Tensor | None = None
        self._layout: _Layout | None = None
        target.register_forward_pre_hook(self._give_positions, with_kwargs=True)
        for part in head.modules():
            if isinstance(part, SelfAttention):
                part.forward = self._by_document(part.forward)

    @contextmanager
    def of(self, batch: TokenBatch) -> Iterator[None]:
        """While this lasts, every forward is over ``batch``, packed or not."""
        if batch.positions_BT is not None:
            self._positions_BT, self._layout = batch.positions_BT, _Layout(batch.positions_BT)
        try:
            yield
        finally:
            self._positions_BT = self._layout = None

    def _give_positions(self, _module: nn.Module, args: tuple, kwargs: dict):
        if self._positions_BT is None:
            return None
        return args, kwargs | {"position_ids": self._positions_BT}

    def _by_document(self, forward):
        def run(x, positions_BT, attend):
            layout = self._layout
            if layout is None:
                return forward(x, positions_BT, attend)

            def attend_by_document(q, k, v):
                return layout.join(attend(*map(layout.split, (q, k, v))))

            slots_T = torch.arange(x.shape[1], device=x.device)
            restarted_BT = positions_BT - slots_T + self._positions_BT
            return forward(x, restarted_BT, attend_by_document)

        return run


class _Layout:
    """Where the documents of a packed batch lie."""

    def __init__(self, positions_BT: torch.Tensor) -> None:
        B, T = positions_BT.shape
        positions_P = positions_BT.flatten()
        document_P = (positions_P == 0).cumsum(0) - 1
        first_C = (positions_P == 0).nonzero().squeeze(1)
        self.shape_BT = B, T
        self.shape_CL = len(first_C), int(positions_P.max()) + 1
        self.padded_P = document_P * self.shape_CL[1] + positions_P
        # Padding copies slot 0, which nothing sees: no slot sees a later one.
        self.packed_CL = torch.zeros(
            self.shape_CL[0] * self.shape_CL[1], dtype=torch.int64, device=positions_P.device
        )
        self.packed_CL[self.padded_P] = torch.arange(B * T, device=positions_P.device)

    def split(self, x_BNTD: torch.Tensor) -> torch.Tensor:
        """[B, N, T, D] -> [C, N, L, D]."""
        x_PND = x_BNTD.transpose(1, 2).flatten(0, 1)
        return x_PND.index_select(0, self.packed_CL).unflatten(0, self.shape_CL).transpose(1, 2)

    def join(self, x_CNLD: torch.Tensor) -> torch.Tensor:
        """[C, N, L, D] -> [B, N, T, D]."""
        x_CLND = x_CNLD.transpose(1, 2).flatten(0, 1)
        return x_CLND.index_select(0, self.padded_P).unflatten(0, self.shape_BT).transpose(1, 2)
