"""The draft's best children."""

import pytest
import torch

from tests.ops.setups import DEVICE
from vllm_eagle3.ops import draft_topk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_log_softmax_then_topk(dtype):
    logits = (torch.randn(5, 999, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    log_probs, ids = draft_topk(logits.to(DEVICE), 8)
    expected = logits.double().log_softmax(dim=1)
    plain_error = (logits.float().log_softmax(dim=1) - expected).abs().max()
    assert log_probs.dtype == torch.float32
    assert ids.dtype == torch.int64
    found = expected.to(DEVICE).gather(1, ids)
    assert (log_probs - found).abs().max() <= 2 * plain_error + 1e-6
    # Ties in half precision may order ids differently, but not the values.
    assert torch.equal(found, expected.topk(8, dim=1).values.to(DEVICE))


def test_ties_repeat():
    logits = torch.zeros(4, 500, device=DEVICE)
    first, second = draft_topk(logits, 10), draft_topk(logits.clone(), 10)
    assert torch.equal(first[1], second[1])
    assert first[1][0].unique().numel() == 10


@pytest.mark.parametrize("k", [0, 4])
def test_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match="k must be between 1 and the vocabulary of 3"):
        draft_topk(torch.zeros(1, 3), k)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="float matrix"):
        draft_topk(torch.zeros(1, 3, dtype=torch.int64), 1)
