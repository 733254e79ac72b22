"""Does a sample come from a distribution? For every test of losslessness under sampling."""

import math

import torch

MIN_EXPECTED = 5.0


def chi_square(counts_V: torch.Tensor, probs_V: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom.

    Outcomes expected fewer than five times share a bin. An outcome of probability 0 that
    did occur makes the statistic infinite.

    Args:
        counts_V: integer, occurrences of each outcome.
        probs_V: float, probability of each outcome.
    """
    counts_V, probs_V = counts_V.flatten().double(), probs_V.flatten().double()
    if counts_V[probs_V == 0].any():
        return math.inf, 1
    expected_V = counts_V.sum() * probs_V / probs_V.sum()
    order_V = expected_V.argsort(descending=True)
    counts_V, expected_V = counts_V[order_V], expected_V[order_V]
    num_large = int((expected_V >= MIN_EXPECTED).sum())
    # The rare outcomes together; where even together they are rare, the next one joins.
    if expected_V[num_large:].sum() < MIN_EXPECTED:
        num_large -= 1
    if num_large < 1:
        return 0.0, 0
    counts_X = torch.cat([counts_V[:num_large], counts_V[num_large:].sum()[None]])
    expected_X = torch.cat([expected_V[:num_large], expected_V[num_large:].sum()[None]])
    return float(((counts_X - expected_X) ** 2 / expected_X).sum()), num_large


def is_drawn_from(counts_V: torch.Tensor, probs_V: torch.Tensor) -> bool:
    """Whether the statistic stays within ten standard deviations of its mean.

    A right sampler fails once in ten thousand seeds at one degree of freedom, and once in a
    hundred million at 15: with a fixed seed, a failure is a bug and not bad luck.
    """
    statistic, freedom = chi_square(counts_V, probs_V)
    return statistic <= freedom + 10 * math.sqrt(2 * freedom)


def count_tokens(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Occurrences of each token."""
    return torch.bincount(tokens.flatten().long(), minlength=vocab_size)


def count_pairs(first: torch.Tensor, second: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Occurrences of each pair of tokens, ``[vocab_size, vocab_size]``."""
    pairs = first.flatten().long() * vocab_size + second.flatten().long()
    return torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size)
