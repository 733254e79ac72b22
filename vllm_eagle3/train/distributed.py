"""One process for each GPU, started by ``torchrun``; alone, a world of one.

The head is small and the target fits on every GPU, so each process holds both and reads its
own share of every step's batches. Gradients are summed once a step, tensor by tensor: a head
has about fifteen tensors, and as every draft step uses all of them, none is complete before
the backward pass is: there is nothing to overlap, which is what DDP's buckets are for.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """The process that logs, evaluates and writes."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The main process's values for all, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @torch.no_grad()
    def sum_gradients(self, module: torch.nn.Module) -> None:
        """Sum the gradients; a process that had nothing to read adds zeros."""
        if self.size == 1:
            return
        for weight in module.parameters():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)

    @torch.no_grad()
    def share_weights(self, module: torch.nn.Module) -> None:
        """The main process's weights for all, with the scale that a checkpoint leaves out."""
        for tensor in (*module.state_dict().values(), module.feature_scale_F):
            self.from_main_(tensor)


def is_main_process() -> bool:
    """Whether of the processes that ``torchrun`` started, if any, this is the first."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str | None) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that ``torchrun`` started, if it started this one.

    Args:
        device: ``"cuda"``, ``"cpu"``; None takes CUDA where there is some.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(), torch.device(kind)
        return
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    chosen = torch.device(kind)
    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own: start torchrun with "
                f"--nproc-per-node {torch.cuda.device_count()}"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        device_id=chosen if chosen.type == "cuda" else None,
    )
    try:
        yield world, chosen
    finally:
        dist.destroy_process_group()
