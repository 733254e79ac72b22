"""Between two logs the host reads nothing of the device, so that it can run ahead of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train import small
from vllm_eagle3.corpus import write_shard
from vllm_eagle3.train import trainer
from vllm_eagle3.train.distributed import World
from vllm_eagle3.train.learner import Learner
from vllm_eagle3.train.loader import Loader
from vllm_eagle3.train.objectives import OBJECTIVES
from vllm_eagle3.train.settings import TrainConfig
from vllm_eagle3.train.trainer import train

CPU = torch.device("cpu")
ATEN = torch.ops.aten
# For their result, or its size, the host waits; `lift_fresh` is of `torch.tensor`, from other than
# pinned memory.
WAITING = {
    *(ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.is_nonzero),
    *(ATEN.unique_dim, ATEN._unique2, ATEN.bincount, ATEN.lift_fresh),
}
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_}
OUT_OF_DISPATCH = ("tolist", "numpy", "cpu")  # those that read a CPU's memory as it is


class Waits(TorchDispatchMode):
    """Lists the operations that would make the host wait, were the tensors a GPU's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in INDEXING and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func.overloadpacket in WAITING or by_mask:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def waits_noted() -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as patch, Waits() as waits:
        for name in OUT_OF_DISPATCH:
            patch.setattr(torch.Tensor, name, noted(name, waits.seen))
        yield waits.seen


def noted(name: str, seen: list[str]) -> Callable[..., Any]:
    method = getattr(torch.Tensor, name)

    def run(self, *args, **kwargs):
        seen.append(name)
        return method(self, *args, **kwargs)

    return run


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: 1 if x.any() else 0,
        lambda x: torch.tensor([1.0, 2.0]) + x,
    ],
)
def test_waits_are_noted(wait) -> None:
    x = torch.ones(2)
    with waits_noted() as seen:
        torch.where(x > 0, x, 0.0)[torch.arange(2)].clamp_(min=0)
        assert not seen
        wait(x)
    assert len(seen) == 1


@pytest.mark.parametrize("changes", [{}, {"packing": False}, {"accumulate": 2, "recompute": True}])
@pytest.mark.parametrize("objective", ["eagle3", "hass"])
def test_a_step_that_is_not_logged_reads_nothing_back(
    objective: str, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.llama().save_pretrained(tmp_path / "target")
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "shard-00-00000.safetensors", small.documents(60))
    settings = {"draft_vocab_size": 80, "batch_tokens": 512, "max_length": 128, "epochs": 9}
    often = {"steps": 7, "log_every": 3, "eval_documents": 0}
    config = TrainConfig(objective=objective, **settings, **often, **changes)
    after: dict[int, list[str]] = {}
    loop, step = trainer._Trainer._loop, trainer._Trainer._step

    def noted_loop(self) -> None:
        with waits_noted() as self.waits:
            loop(self)
        after[self.step + 1] = list(self.waits)  # at the end of the run

    def noted_step(self, batches, progress) -> None:
        step(self, batches, progress)
        after[self.step] = list(self.waits)
        self.waits.clear()

    monkeypatch.setattr(trainer._Trainer, "_loop", noted_loop)
    monkeypatch.setattr(trainer._Trainer, "_step", noted_step)
    train(tmp_path / "target", tmp_path / "data", tmp_path / "out", config, "cpu")
    del after[1]  # the optimiser makes its state
    assert {step for step, waits in after.items() if waits} == {3, 6, 8}, after


@pytest.mark.parametrize("name", ["eagle3", "hass"])
def test_slots_that_were_not_counted_before_are_counted_in_the_loss(name: str) -> None:
    objective = OBJECTIVES[name]
    target, head = small.head_for(objective, torch.float32)
    config = TrainConfig(batch_tokens=512, objective=name)
    loader = Loader(small.documents(40), config, World(), objective.settings.num_steps)
    ((batch, _),) = next(loader.steps(0, CPU)).parts
    head.eval()  # no noise
    loss = objective.loss(head, objective.read(target, batch, head), objective.settings).loss
    batch.slots = None
    again = objective.loss(head, objective.read(target, batch, head), objective.settings).loss
    assert loss == again


def test_a_gradient_that_is_not_finite_changes_nothing_though_it_is_noticed_later(
    tmp_path: Path,
) -> None:
    small.llama().save_pretrained(tmp_path)
    config = TrainConfig(draft_vocab_size=80, batch_tokens=512, max_length=128, learning_rate=0.1)
    documents = small.documents(60)
    learner = Learner(tmp_path, documents, config, CPU, World())
    loader = Loader(documents, config, World(), learner.settings.num_steps)
    steps = [step for step, _ in zip(loader.steps(0, CPU), range(3), strict=False)]

    def weights() -> list[torch.Tensor]:
        moments = (x for state in learner.optimizer.state.values() for x in state.values())
        return [x.detach().clone() for x in (*learner.head.parameters(), *moments)]

    learner.optimise(steps[0], 0.5)
    before = weights()
    learner.check_finite()
    learner.head.feature_scale_F.fill_(float("nan"))
    learner.optimise(steps[1], 0.5)
    learner.head.feature_scale_F.fill_(1.0)
    learner.optimise(steps[2], 0.5)  # finite, and yet nothing that training would go on from
    assert all(map(torch.equal, before, weights()))
    with pytest.raises(FloatingPointError):
        learner.check_finite()
    assert learner.updates == 1
