"""Text that repeats itself: small models fall into loops that never end."""

from collections.abc import Sequence

import numpy as np

TIMES = 3
# A loop of fewer tokens is found as one of a multiple of its length.
PERIODS = range(8, 49)


def end_of_loop(tokens: Sequence[int]) -> int | None:
    """How many of ``tokens`` there are when the last ones are the same for the third time.

    Args:
        tokens: token ids, T of them.

    Returns:
        The least such number over all lengths of loops in ``PERIODS``; None without a loop.
    """
    tokens_T = np.asarray(tokens)
    ends = (_third_time(tokens_T, period) for period in PERIODS)
    return min((end for end in ends if end is not None), default=None)


def _third_time(tokens_T: np.ndarray, period: int) -> int | None:
    if len(tokens_T) < TIMES * period:
        return None
    differs = np.flatnonzero(tokens_T[period:] != tokens_T[:-period])
    # Equal to the token a period before, without a break, (TIMES - 1) * period times.
    starts = np.concatenate(([0], differs + 1))
    stops = np.append(differs, len(tokens_T) - period)
    long = np.flatnonzero(stops - starts >= (TIMES - 1) * period)
    return int(starts[long[0]]) + TIMES * period if len(long) else None
