"""What a measure costs: the products of the forward, and none for gradients."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.train import small
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.objectives import OBJECTIVES
from vllm_eagle3.train.objectives.cross_entropy import (
    LinearSoftCrossEntropy,
    SharedHeadCrossEntropy,
)
from vllm_eagle3.train.objectives.slots import counted_slots

M, H, V = 12, 8, 20
PRODUCT = 2 * M * H * V


def flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_only_the_gradients_that_are_needed_are_computed() -> None:
    torch.manual_seed(0)
    x, matrix, target = torch.randn(M, H), torch.randn(V, H), torch.randn(M, V)
    rows, weights = torch.arange(M), torch.rand(M)

    def linear(of_x: bool, of_w: bool) -> list[torch.Tensor | None]:
        inputs = x.clone().requires_grad_(of_x), matrix.clone().requires_grad_(of_w)
        loss, *_ = LinearSoftCrossEntropy.apply(*inputs, target, rows, weights)
        if of_x or of_w:
            loss.backward()
        return [loss.detach(), *(tensor.grad for tensor in inputs)]

    both = linear(True, True)
    for needed in ((False, False), (True, False), (False, True)):
        assert flops(lambda needed=needed: linear(*needed)) == PRODUCT * (1 + sum(needed))
        for got, expected, given in zip(linear(*needed), both, (True, *needed), strict=True):
            assert torch.equal(got, expected) if given else got is None

    def shared(of_x: bool) -> list[torch.Tensor]:
        loss, *measures = SharedHeadCrossEntropy.apply(
            x.clone().requires_grad_(of_x), x.flip(0), matrix, 0.3, 0.7, 3
        )
        return [loss.detach(), *measures]

    assert flops(lambda: shared(False)) == 2 * PRODUCT
    assert flops(lambda: shared(True)) == 3 * PRODUCT
    assert all(map(torch.equal, shared(False), shared(True)))


@pytest.mark.parametrize("name", ["eagle3", "hass"])
def test_an_evaluation_computes_no_gradients(name: str) -> None:
    """EAGLE-3 has two, of states and matrix; HASS one of states, of its two terms together."""
    objective = OBJECTIVES[name]
    target, head = small.head_for(objective, torch.float32)
    tokens = next(epoch_batches(small.documents(4), 512, 64, seed=0))
    batch = objective.read(target, tokens, head)

    def measure() -> None:
        objective.loss(head, batch, objective.settings)

    with torch.no_grad():
        measured = flops(measure)
    steps = range(objective.settings.num_steps)
    counted = sum(len(counted_slots(tokens.assistant_BT, step)) for step in steps)
    product = 2 * counted * head.config.hidden_size * len(head.d2t)
    num_gradients = {"eagle3": 2, "hass": 1}[name]
    assert flops(measure) - measured == num_gradients * product > 0
