"""Which slots of a batch count, and how far a chain of drafts would have come.

Shape suffixes: B sequences, T slots, P = B T rows, M counted slots, K steps.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vllm_eagle3.train.data import CountedSlots


def counted_slots(assistant_BT: torch.Tensor, step: int) -> torch.Tensor:
    """Flat indices, int64 [M], of the slots whose root and predicted token are the assistant's.

    The root is token t+1, the predicted token t+2+step.
    """
    root_BT = shift_left(assistant_BT, 1)
    return (root_BT & shift_left(assistant_BT, 2 + step)).flatten().nonzero().squeeze(1)


def slots_of_steps(
    assistant_BT: torch.Tensor, num_steps: int, counted: CountedSlots | None = None
) -> CountedSlots:
    """:func:`counted_slots` of steps 0..K-1.

    Counting makes the host wait for a GPU.

    Args:
        counted: those of the same batch, if it has been done before, of at least as many steps.
    """
    if counted is not None and len(counted.sizes) >= num_steps:
        sizes = counted.sizes[:num_steps]
        return CountedSlots(counted.at_M[: sum(sizes)], sizes)
    slots = [counted_slots(assistant_BT, step) for step in range(num_steps)]
    at = [slots_M + step * assistant_BT.numel() for step, slots_M in enumerate(slots)]
    return CountedSlots(torch.cat(at), tuple(map(len, slots)))


def shift_left(x_BT: torch.Tensor, by: int) -> torch.Tensor:
    """x[:, t] <- x[:, t + by]; zeros (False) where a document ends."""
    return F.pad(x_BT[:, by:], (0, min(by, x_BT.shape[1])))


def sums_of_steps(
    slots: CountedSlots, num_slots: int, values_XM: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Sums of values of the counted slots over each draft step, [X, K].

    In a fixed order, unlike atomic additions, and without an operation for each step.

    Args:
        num_slots: P, of the batch.
    """
    values = torch.stack(tuple(values_XM))
    K = len(slots.sizes)
    values_XKP = values.new_zeros(len(values), K * num_slots).index_copy_(1, slots.at_M, values)
    return values_XKP.view(-1, K, num_slots).sum(-1)


def accepted_share(slots: CountedSlots, num_slots: int, right_M: torch.Tensor) -> torch.Tensor:
    """Share of the roots from which all drafts of steps 0..k equal the document, [K].

    Args:
        num_slots: P, of the batch.
        right_M: bool, whether a counted slot's draft does.
    """
    K = len(slots.sizes)
    right_KP = right_M.new_zeros(K * num_slots).index_copy_(0, slots.at_M, right_M)
    return right_KP.view(K, num_slots).cumprod(0).sum(-1) / max(1, slots.sizes[0])
