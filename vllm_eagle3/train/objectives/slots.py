"""Which slots of a batch count, and how far a chain of drafts would have come.

Shape suffixes: B sequences, T slots, P = B T rows, M counted slots, K steps.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def counted_slots(assistant_BT: torch.Tensor, step: int) -> torch.Tensor:
    """Flat indices, int64 [M], of the slots whose root and predicted token are the assistant's.

    The root is token t+1, the predicted token t+2+step.
    """
    root_BT = shift_left(assistant_BT, 1)
    return (root_BT & shift_left(assistant_BT, 2 + step)).flatten().nonzero().squeeze(1)


def slots_of_steps(
    assistant_BT: torch.Tensor, num_steps: int, counted: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, ...]:
    """:func:`counted_slots` of steps 0..K-1.

    Counting makes the host wait for a GPU.

    Args:
        counted: those of the same batch, if it has been done before, of at least as many steps.
    """
    if len(counted) >= num_steps:
        return tuple(counted[:num_steps])
    return tuple(counted_slots(assistant_BT, step) for step in range(num_steps))


def shift_left(x_BT: torch.Tensor, by: int) -> torch.Tensor:
    """x[:, t] <- x[:, t + by]; zeros (False) where a document ends."""
    return F.pad(x_BT[:, by:], (0, min(by, x_BT.shape[1])))


class ChainAcceptance:
    """Counts the slots from which every draft so far equals the document."""

    def __init__(self, tokens_BT: torch.Tensor, num_roots: int) -> None:
        """``num_roots``: counted slots of step 0."""
        self._tokens_P = tokens_BT.flatten()
        self._on_track_P = torch.ones_like(self._tokens_P, dtype=torch.bool)
        self._num_roots = max(1, num_roots)

    def share(self, step: int, slots_M: torch.Tensor, drafted_M: torch.Tensor) -> torch.Tensor:
        """The share after ``step``; its counted slots drafted ``drafted_M``, target ids."""
        right_P = torch.zeros_like(self._on_track_P)
        right_P[slots_M] = drafted_M == self._tokens_P[slots_M + 2 + step]
        self._on_track_P &= right_P
        return self._on_track_P.sum() / self._num_roots
