"""One process for each GPU, started by ``torchrun``; alone, a world of one.

The head is small: each process holds all of it, under DistributedDataParallel, and reads its
own share of every step's batches. The frozen target is held whole as well, or, where it does
not fit, spread over the processes layer by layer with FSDP2's ``fully_shard``.
"""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# What torch 2.13 calls ``broadcast_buffers`` in every forward.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
# The others wait while the main process evaluates and writes.
_PATIENCE = timedelta(hours=2)
_GRACE = 15.0  # seconds in which torchrun ends the others, once a process has failed


@dataclass(frozen=True)
class World:
    """Which of how many processes this is.

    Attributes:
        hosts: the group in which the processes agree without their GPUs; None for the group of
            all that they do, or for one process.
    """

    rank: int = 0
    size: int = 1
    hosts: dist.ProcessGroup | None = None

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

    def any(self, flag: bool) -> bool:
        """Whether the flag of any process is set; no GPU is waited for."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags, group=self.hosts)
        return bool(flags > 0)

    def number_of_main(self, number: float) -> float:
        """The main process's number for all; no GPU is waited for."""
        if self.size == 1:
            return number
        shared = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(shared, 0, group=self.hosts)
        return shared.item()

    def replicate(self, module: nn.Module) -> nn.Module:
        """``module`` with the main process's weights; a backward pass averages its gradients.

        Losses that are to be added up over processes must be multiplied by their number.
        """
        if self.size == 1:
            return module
        # Once: no buffer changes in training, and the target's embedding is one.
        for buffer in module.buffers():
            self.from_main_(buffer)
        return DistributedDataParallel(
            module, gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False}
        )

    def shard_layers(self, model: nn.Module, device: torch.device) -> None:
        """Spread the decoder layers of a Transformers model over the processes, in place.

        A layer is gathered for its forward and let go of after it; the next one is gathered
        meanwhile. Embedding, final norm and output matrix stay whole: training reads them.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        body = model.model
        for layer in body.layers:
            fully_shard(layer, mesh=mesh)
        whole = {*body.embed_tokens.parameters(), *body.norm.parameters()}
        fully_shard(body, mesh=mesh, ignored_params=whole)


def syncing(module: nn.Module, active: bool) -> AbstractContextManager:
    """For a forward and backward: average gradients over processes, or only add them up here."""
    if active or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def is_main_process() -> bool:
    """Whether of the processes that ``torchrun`` started, if any, this is the first."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def failing_once() -> Iterator[None]:
    """Let the first process of a machine report what fails in all of them.

    The others hold their exceptions back until ``torchrun`` ends them, as it does once the first
    has failed. One that is not ended has failed by itself: its exception goes on.
    """
    try:
        yield
    except Exception:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            time.sleep(_GRACE)
        raise


def choose_device(device: str | None) -> torch.device:
    """The device of ``--device``; a GPU that it names becomes the current one.

    Args:
        device: ``"cuda"``, ``"cpu"``; None takes CUDA where there is some.

    Raises:
        ValueError: it is neither, or there is no such GPU.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {device}: use cuda or cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here; "
            "`vllm-eagle3 doctor` says what is installed, --device cpu trains without one"
        )
    if chosen.index is not None and chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # where Triton launches, whichever GPU the tensors are on
    return chosen


@contextmanager
def joined(device: str | None) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that ``torchrun`` started, if it started this one.

    After an exception the group is left as it is: to leave it, NCCL would wait for the others,
    who may be waiting for this process. Once this process ends, ``torchrun`` ends the others.

    Args:
        device: as :func:`choose_device` takes it.

    Raises:
        ValueError: no such device, or more processes on this machine than GPUs.
    """
    chosen = choose_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(), chosen
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        processes = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if processes > torch.cuda.device_count():
            raise ValueError(
                f"not each of the {processes} processes of this machine has a GPU of its own: "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        device_id=chosen if chosen.type == "cuda" else None,
        timeout=_PATIENCE,
    )
    # What the hosts agree on in every step must not wait for the GPUs' queues.
    hosts = dist.new_group(backend="gloo", timeout=_PATIENCE) if chosen.type == "cuda" else None
    yield World(rank, size, hosts), chosen
    dist.destroy_process_group()
