"""Which slots of a batch count, and what they are aligned with.

Shape suffixes: B sequences, T slots, M counted slots.
"""

import torch
import torch.nn.functional as F


def counted_slots(assistant_BT: torch.Tensor, step: int) -> torch.Tensor:
    """Flat indices of the slots whose root (token t+1) and whose predicted token (t+2+step)
    are the assistant's, int64 [M]."""
    root_BT = shift_left(assistant_BT, 1)
    return (root_BT & shift_left(assistant_BT, 2 + step)).flatten().nonzero().squeeze(1)


def shift_left(x_BT: torch.Tensor, by: int) -> torch.Tensor:
    """x[:, t] <- x[:, t + by]; zeros (False) where a document ends."""
    return F.pad(x_BT[:, by:], (0, min(by, x_BT.shape[1])))
