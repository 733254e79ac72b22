"""Recomputed activations are not kept, and change nothing."""

import torch

from tests.train import small
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.objectives import LossSettings
from vllm_eagle3.train.objectives.eagle3 import ttt_loss


def kept_and_gradients(recompute: bool) -> tuple[int, tuple[torch.Tensor, ...]]:
    target, head = small.pair(torch.float32)
    tokens = next(epoch_batches(small.documents(6), 6 * 64, 64, seed=0))
    batch = target.read(tokens, head.draft_token_ids, head.t2d)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (sizes.append(x.numel()), x)[1], lambda x: x
    ):
        result = ttt_loss(head, batch, LossSettings(3, recompute=recompute))
    return sum(sizes), torch.autograd.grad(result.loss, list(head.parameters()))


def test_gradients_are_the_same_bit_by_bit_with_less_kept() -> None:
    kept, gradients = kept_and_gradients(False)
    fewer, same = kept_and_gradients(True)
    assert fewer < 0.5 * kept
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
