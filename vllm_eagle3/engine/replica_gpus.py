"""Which GPUs each replica has: they are dealt out in turn."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

_VARIABLE = "CUDA_VISIBLE_DEVICES"


class Placement(NamedTuple):
    """Where a replica runs.

    Attributes:
        gpus: those it sees, as ``CUDA_VISIBLE_DEVICES`` names them; empty where there are none
            to choose among.
        sharing: replicas on them, itself included.
    """

    gpus: tuple[str, ...]
    sharing: int


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count()
    listed = os.environ.get(_VARIABLE)
    names = list(map(str, range(count))) if listed is None else listed.split(",")
    return [name.strip() for name in names[:count]]


def place(num_replicas: int, gpus: Sequence[str], gpus_each: int = 1) -> list[Placement]:
    """Deal ``gpus`` out to the replicas, in turn.

    Args:
        gpus_each: that an engine spreads a model over; those left over stay idle.

    Raises:
        ValueError: there are some GPUs, but fewer than one engine needs.
    """
    if not gpus:
        return [Placement((), num_replicas)] * num_replicas
    if len(gpus) < gpus_each:
        raise ValueError(f"an engine is to have {gpus_each} GPUs, and there are {len(gpus)}")
    starts = range(0, len(gpus) - gpus_each + 1, gpus_each)
    groups = [tuple(gpus[start : start + gpus_each]) for start in starts]
    return [
        Placement(
            groups[index % len(groups)],
            len(range(index % len(groups), num_replicas, len(groups))),
        )
        for index in range(num_replicas)
    ]


@contextmanager
def seeing(gpus: Sequence[str]) -> Iterator[None]:
    """Processes that are started within see these GPUs alone; all of them where none is given."""
    before = os.environ.get(_VARIABLE)
    if gpus:
        os.environ[_VARIABLE] = ",".join(gpus)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_VARIABLE] = before
        else:
            os.environ.pop(_VARIABLE, None)
