"""Several documents in a row, none of which sees another.

A packed batch has rows of one length and, in ``positions_BT``, positions that restart at 0 where
a document begins; a gap before the next one belongs to it, and what is left at a row's end is laid
out as further documents, of nothing.
All that works token by token (projections, MLP, output matrix) runs over the rows and reads no
padding. Where slots see each other, the documents are taken apart: by target and head alike, in
:mod:`vllm_eagle3.train.documents`.

The documents of a batch are within a factor of four in length, so that each of them as a row of
its own, padded, is not much larger than the batch: about 1.5 times, on lognormal lengths.

Shape suffixes: B rows, T slots.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vllm_eagle3.corpus import Document
from vllm_eagle3.train.data import TokenBatch

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
        batch_tokens: of a batch; the last one of each class of lengths may hold fewer. No
            document is cut to it: rows are as long as the longest one, at least.
        max_length: of a row, and of a document: longer ones are cut.
        num_steps: draft steps; so far from a document's last token no other document has one
            of the assistant's, so that no slot counts across the two.
    """
    sizes = np.array([min(len(d.tokens), max_length) for d in documents])
    length = min(max_length, max(batch_tokens, int(sizes.max())))
    rows_of_batch = max(1, batch_tokens // length)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(documents))
    class_of = np.searchsorted(_class_bounds(length), sizes)
    window = max(1, int(_WINDOW_BATCHES * batch_tokens / sizes.mean()))
    batches: list[list[list[int]]] = []
    waiting = {int(number): np.empty(0, dtype=np.int64) for number in np.unique(class_of)}
    for start in range(0, len(order), window):
        part, is_last = order[start : start + window], start + window >= len(order)
        for number, before in waiting.items():
            alike = np.concatenate((before, part[class_of[part] == number]))
            alike = alike[np.argsort(-sizes[alike], kind="stable")]
            rows = _first_fit([(i, documents[i]) for i in alike], length, num_steps)
            # What fills no batch waits for the next window: however small, it would be a step.
            used = len(rows) if is_last else len(rows) // rows_of_batch * rows_of_batch
            batches += [rows[i : i + rows_of_batch] for i in range(0, used, rows_of_batch)]
            waiting[number] = np.array([i for row in rows[used:] for i in row], dtype=np.int64)
    for index in rng.permutation(len(batches)):
        yield _lay_out([[documents[i] for i in row] for row in batches[index]], length, num_steps)


def _class_bounds(length: int) -> list[int]:
    """Rising: the longest document of each class but the last; a quarter of the next one's."""
    bounds, bound = [], length // _CLASS_FACTOR
    while bound >= _SHORT:
        bounds.append(bound)
        bound //= _CLASS_FACTOR
    return bounds[::-1]


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
