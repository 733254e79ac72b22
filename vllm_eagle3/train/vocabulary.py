"""The draft vocabulary: the target's most frequent tokens."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vllm_eagle3.corpus import Document

COVERED = 0.99
_STEP = 1024


def count_tokens(documents: Iterable[Document], vocab_size: int) -> np.ndarray:
    """How often the assistant writes each token, int64 [vocab_size]."""
    written = np.concatenate([document.tokens[document.assistant] for document in documents])
    return np.bincount(written, minlength=vocab_size)


def covering_size(counts: np.ndarray) -> int:
    """The smallest multiple of 1024 whose most frequent tokens are 99 % of the text.

    A token outside of the draft vocabulary ends a path of the tree as a wrong draft does, at
    every depth; 1024 more rows of a head's output are 0.06 % of the bytes of an 8B target.
    """
    covered = np.cumsum(np.sort(counts)[::-1])
    needed = 1 + int(np.searchsorted(covered, COVERED * covered[-1]))
    return min(len(counts), -(-needed // _STEP) * _STEP)


def frequent_tokens(
    counts: np.ndarray, draft_vocab_size: int, always: Sequence[int]
) -> tuple[torch.Tensor, float]:
    """The ``draft_vocab_size`` tokens of the highest counts, and ``always``.

    Args:
        counts: of :func:`count_tokens`.
        always: ids kept whatever their frequency, such as the ends of a turn.

    Returns:
        int64 [draft_vocab_size], rising target ids; and the share of the assistant's
        tokens that they cover.

    Raises:
        ValueError: the size is smaller than ``always`` or larger than the vocabulary.
    """
    kept = sorted(set(always))
    if not len(kept) <= draft_vocab_size <= len(counts):
        raise ValueError(
            f"draft_vocab_size={draft_vocab_size} must be between {len(kept)} and the "
            f"target's vocabulary of {len(counts)}"
        )
    ranked = counts.copy()
    ranked[kept] = np.iinfo(np.int64).max
    # Stable, so that ties among unseen tokens fall to the lower ids on every machine.
    chosen = np.sort(np.argsort(-ranked, kind="stable")[:draft_vocab_size])
    coverage = float(counts[chosen].sum() / max(1, counts.sum()))
    return torch.from_numpy(chosen.astype(np.int64)), coverage
