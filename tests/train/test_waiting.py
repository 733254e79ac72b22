"""A part of a step is read and its loss computed without the host waiting for the device."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train import small
from vllm_eagle3.train.distributed import World
from vllm_eagle3.train.loader import Loader
from vllm_eagle3.train.objectives import OBJECTIVES
from vllm_eagle3.train.settings import TrainConfig

CPU = torch.device("cpu")


class Waits(TorchDispatchMode):
    """Counts the operations whose results the host needs before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["eagle3", "hass"])
def test_nothing_of_a_part_is_read_back(name: str, packing: bool) -> None:
    objective = OBJECTIVES[name]
    target, head = small.head_for(objective, torch.float32)
    config = TrainConfig(batch_tokens=512, packing=packing, objective=name)
    num_steps = objective.settings.num_steps
    loader = Loader(small.documents(40), config, World(), num_steps)
    ((batch, _),) = next(loader.steps(0, CPU)).parts
    head.eval()  # no noise
    with Waits() as waits:
        loss = objective.loss(head, objective.read(target, batch, head), objective.settings).loss
        loss.backward()
    assert not waits.seen
    batch.slots = ()
    with Waits() as waits:
        again = objective.loss(head, objective.read(target, batch, head), objective.settings).loss
    assert sum(waits.seen.values()) == num_steps
    assert loss == again
