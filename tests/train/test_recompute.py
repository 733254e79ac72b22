"""What a step of training holds: recomputed activations are not kept, and nothing is T x T."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.train import small
from tests.train.allocations import Allocations
from vllm_eagle3.corpus import Document
from vllm_eagle3.train.data import TokenBatch, epoch_batches
from vllm_eagle3.train.objectives import OBJECTIVES
from vllm_eagle3.train.packing import packed_batches


def long_batch(length: int, packing: bool) -> TokenBatch:
    """One row: of two documents if packed, else of one."""
    sizes = (length // 2, length // 2 - 8) if packing else (length,)
    rows = [np.arange(size) % small.VOCABULARY for size in sizes]
    given = [Document(tokens, np.arange(len(tokens)) > 4) for tokens in rows]
    if packing:
        return next(packed_batches(given, length, length, num_steps=4, seed=0))
    return next(epoch_batches(given, length, length, seed=0))


def peak_and_gradients(
    name: str, batch: TokenBatch, recompute: bool
) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Most bytes of all tensors in forward and backward, and the gradients."""
    objective = OBJECTIVES[name]
    target, head = small.head_for(objective, torch.float32)
    head.eval()  # no noise
    settings = replace(objective.settings, num_steps=6, decay=0.8, recompute=recompute)
    read = objective.read(target, batch, head)
    with Allocations() as allocated:
        loss = objective.loss(head, read, settings).loss
        gradients = torch.autograd.grad(loss, list(head.parameters()))
    return allocated.peak, gradients


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_the_same_bit_by_bit_in_less_memory(name: str, packing: bool) -> None:
    batch = long_batch(512, packing)
    peak, gradients = peak_and_gradients(name, batch, False)
    lower, same = peak_and_gradients(name, batch, True)
    assert lower < 0.6 * peak
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["eagle3", "hass"])
def test_nothing_of_a_step_outlives_it_until_garbage_is_collected(
    name: str, recompute: bool
) -> None:
    objective, batch = OBJECTIVES[name], long_batch(512, packing=True)
    target, head = small.head_for(objective, torch.float32)
    settings = replace(objective.settings, recompute=recompute)
    gc.collect()
    gc.disable()
    try:
        live = []
        with Allocations() as allocated:
            for _ in range(3):
                objective.loss(head, objective.read(target, batch, head), settings).loss.backward()
                head.zero_grad()
                live.append(allocated.live)
    finally:
        gc.enable()
    assert live[0] == live[1] == live[2]  # of weights alone


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", ["eagle3", "hass"])
def test_no_tensor_grows_with_the_square_of_the_length(name: str, packing: bool) -> None:
    """Neither a mask nor scores, in target, head, loss or the gradient of these."""
    objective = OBJECTIVES[name]
    target, head = small.head_for(objective, torch.float32)
    settings = replace(objective.settings, num_steps=4)
    largest = {}
    for length in (1024, 2048):
        batch = long_batch(length, packing)
        assert batch.tokens_BT.shape == (1, length)
        with Allocations() as allocated:
            objective.loss(head, objective.read(target, batch, head), settings).loss.backward()
        largest[length] = allocated.largest
    assert largest[2048] == pytest.approx(2 * largest[1024], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [False, True])
def test_on_cuda_the_peak_grows_with_the_length_and_gradients_stay(packing: bool) -> None:
    objective = OBJECTIVES["eagle3"]
    target, head = small.head_for(objective, torch.float32)
    target.model.to("cuda", torch.bfloat16)
    head.to("cuda")
    peaks, gradients = {}, []
    for length, recompute in ((4096, True), (8192, True), (8192, False)):
        settings = replace(objective.settings, recompute=recompute)
        batch = long_batch(length, packing).to(torch.device("cuda"))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = objective.loss(head, objective.read(target, batch, head), settings).loss
        found = torch.autograd.grad(loss, list(head.parameters()))
        peaks[length, recompute] = torch.cuda.max_memory_allocated() - before
        if length == 8192:
            gradients.append(found)
    assert peaks[8192, True] < 2.5 * peaks[4096, True]
    assert peaks[8192, True] < 0.7 * peaks[8192, False]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()
