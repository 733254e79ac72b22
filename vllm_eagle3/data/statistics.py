"""Figures of a corpus: lengths, turns, what a draft vocabulary covers, what texts share."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from vllm_eagle3.corpus import Document

VOCABULARY_SIZES = (2048, 4096, 8192, 16384, 32768, 65536)
NGRAM_TOKENS = 4
_TEMPLATE_SAMPLE = 500
_LEAST_SAMPLE = 20
_MIXER = np.uint64(0x9E3779B97F4A7C15)


def turns_of(document: Document, *, assistant: bool) -> list[np.ndarray]:
    """The runs of tokens that the assistant wrote, or those between them; in order."""
    edges = np.flatnonzero(np.diff(document.assistant.astype(np.int8))) + 1
    runs = np.split(document.tokens, edges)
    first_is_answer = bool(len(document.assistant) and document.assistant[0])
    return runs[int(first_is_answer != assistant) :: 2]


def quantiles(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Mean, quantiles and the largest; zeros for no values."""
    values = np.asarray(values if len(values) else [0])
    names = {"10%": 0.1, "median": 0.5, "90%": 0.9, "99%": 0.99}
    figures = {name: float(np.quantile(values, share)) for name, share in names.items()}
    return {"mean": round(float(values.mean()), 1)} | figures | {"largest": float(values.max())}


def coverage(
    counted: Sequence[np.ndarray], measured: Sequence[np.ndarray], sizes: Iterable[int]
) -> list[float]:
    """Share of ``measured`` tokens among the most frequent ``counted`` ones, for every size."""
    counts = np.bincount(_joined(counted))
    order = np.argsort(-counts, kind="stable")
    ranks = np.empty(len(counts), np.int64)
    ranks[order] = np.arange(len(order))
    ranks[counts == 0] = np.iinfo(np.int64).max
    tokens = _joined(measured)
    known = tokens[tokens < len(counts)]
    return [float((ranks[known] < size).sum() / max(1, len(tokens))) for size in sizes]


class NgramIndex:
    """The n-grams of documents, as sorted hashes: 8 bytes each.

    Those of most documents are the chat template's and tell nothing: they are not counted.
    """

    def __init__(self, documents: Sequence[np.ndarray], length: int = NGRAM_TOKENS) -> None:
        self._length = length
        self._hashes = np.unique(_hashes(documents, length))
        sample = documents[:: -(-len(documents) // _TEMPLATE_SAMPLE) or 1]
        held = [np.unique(_hashes([document], length)) for document in sample]
        hashes, counts = np.unique(np.concatenate(held), return_counts=True)
        few = len(sample) < _LEAST_SAMPLE  # too few to tell a template from a repeated phrase
        self._template = hashes[:0] if few else hashes[counts > len(sample) / 2]

    def share_of(self, sequences: Sequence[np.ndarray]) -> float:
        """Share of the n-grams of ``sequences``, each as often as it occurs, that are known."""
        hashes = _hashes(sequences, self._length)
        hashes = hashes[~np.isin(hashes, self._template)]
        return float(np.isin(hashes, self._hashes).mean()) if len(hashes) else 0.0


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """Shares of the writing systems among letters, the most frequent first."""
    letters = Counter(char for text in texts for char in text if char.isalpha())
    found: Counter[str] = Counter()
    for char, count in letters.items():
        found[unicodedata.name(char, "unnamed").split()[0].capitalize()] += count
    total = max(1, found.total())
    return {script: count / total for script, count in found.most_common()}


def _joined(sequences: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *sequences]).astype(np.int64)


def _hashes(sequences: Sequence[np.ndarray], length: int) -> np.ndarray:
    tokens = _joined(sequences).astype(np.uint64)
    if len(tokens) < length:
        return np.zeros(0, np.uint64)
    places = len(tokens) - length + 1
    hashes = np.zeros(places, np.uint64)
    for offset in range(length):
        hashes = (hashes ^ tokens[offset : offset + places]) * _MIXER
        hashes ^= hashes >> np.uint64(29)
    # An n-gram lies within one sequence.
    sequence = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    return hashes[sequence[:places] == sequence[length - 1 :]]
