"""The Triton kernels that a GPU trains with, here in the interpreter, are as exact as torch."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from tests.train import small
from vllm_eagle3.ops import dispatch
from vllm_eagle3.ops.kernels import diagonal_attention, rotary, soft_cross_entropy
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.objectives import OBJECTIVES, cross_entropy
from vllm_eagle3.train.packing import packed_batches

pytestmark = pytest.mark.skipif(
    not dispatch.interpreted(), reason="needs Triton's interpreter; tests/ops is for GPUs"
)
LAUNCHERS = {soft_cross_entropy: "launch", diagonal_attention: "launch_backward", rotary: "launch"}


def choose_kernels(patch: pytest.MonkeyPatch) -> Counter:
    """From now on; counts the launches of each."""
    launches = Counter()

    def counted(kernel, launch):
        def run(*args):
            launches[kernel] += 1
            launch(*args)

        return run

    for kernel, name in LAUNCHERS.items():
        patch.setattr(kernel, name, counted(kernel, getattr(kernel, name)))
    patch.setattr(dispatch, "resolve", lambda *_: "triton")
    return launches


def in_float64(batch):
    wide = {name: x.double() for name, x in vars(batch).items() if is_float(x)}
    return replace(batch, **wide)


def is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", ["eagle3", "eagle3.1", "hass"])
def test_losses_and_gradients_are_no_further_from_float64_than_those_of_torch(
    name: str, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, given = OBJECTIVES[name], small.documents(4)
    num_steps = objective.settings.num_steps
    packed = packed_batches(given, 512, 64, num_steps, seed=0)
    tokens = next(packed if packing else epoch_batches(given, 512, 64, seed=0))
    target, head = small.head_for(objective, torch.float32)
    batch = objective.read(target, tokens, head)

    def run(head, batch):
        head.eval()  # no noise
        result = objective.loss(head, batch, objective.settings)
        gradients = torch.autograd.grad(result.loss, list(head.parameters()))
        return result, [result.loss.detach(), result.losses_K, *gradients]

    _, exact = run(deepcopy(head).double(), in_float64(batch))
    by_torch, expected = run(head, batch)
    launches = choose_kernels(monkeypatch)
    monkeypatch.setattr(cross_entropy, "_FUSED_CHUNK_ELEMENTS", 50 * len(head.d2t))
    by_kernels, found = run(head, batch)
    for ours, theirs, truth in zip(found, expected, exact, strict=True):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-7 * truth.norm()
    assert torch.equal(by_kernels.accuracy_K, by_torch.accuracy_K)
    assert torch.equal(by_kernels.accepted_K, by_torch.accepted_K)
    assert launches[soft_cross_entropy] > 1
    assert launches[diagonal_attention] == num_steps - 1
    assert launches[rotary] == 2 * num_steps  # queries with keys, and the gradient
