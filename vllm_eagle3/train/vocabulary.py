"""The draft vocabulary: the target's most frequent tokens."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vllm_eagle3.corpus import Document


def frequent_tokens(
    documents: Iterable[Document], vocab_size: int, draft_vocab_size: int, always: Sequence[int]
) -> tuple[torch.Tensor, float]:
    """The ``draft_vocab_size`` tokens the assistant writes most, and ``always``.

    Args:
        always: ids kept whatever their frequency, such as the ends of a turn.

    Returns:
        int64 [draft_vocab_size], rising target ids; and the share of the assistant's
        tokens that they cover.

    Raises:
        ValueError: the size is smaller than ``always`` or larger than the vocabulary.
    """
    kept = sorted(set(always))
    if not len(kept) <= draft_vocab_size <= vocab_size:
        raise ValueError(
            f"draft_vocab_size={draft_vocab_size} must be between {len(kept)} and the "
            f"target's vocabulary of {vocab_size}"
        )
    written = np.concatenate([document.tokens[document.assistant] for document in documents])
    counts = np.bincount(written, minlength=vocab_size)
    ranked = counts.copy()
    ranked[kept] = np.iinfo(np.int64).max
    # Stable, so that ties among unseen tokens fall to the lower ids on every machine.
    chosen = np.sort(np.argsort(-ranked, kind="stable")[:draft_vocab_size])
    coverage = float(counts[chosen].sum() / max(1, counts.sum()))
    return torch.from_numpy(chosen.astype(np.int64)), coverage
