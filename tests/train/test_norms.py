"""The norm in one kernel is the norm; the target with it is the target."""

import pytest
import torch

from tests.train import small
from vllm_eagle3.train.layers import RMSNorm
from vllm_eagle3.train.norms import fuse_norms, restore_norms

# Half a step of what the type can tell apart, twice: of the weight and of the result.
PRECISION = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def definition(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients_are_the_definitions(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(48, 1e-3).to(torch.promote_types(dtype, torch.float32))
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    x = (3 * torch.randn(7, 48)).to(dtype).requires_grad_()
    grad = torch.randn(7, 48).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        out = norm(x)
    assert out.dtype == dtype
    out.backward(grad)
    inputs = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = definition(*inputs, norm.eps)
    expected.backward(grad.double())
    near = PRECISION[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=2 * near, atol=0)
    for found, (wide, size) in (
        (x.grad, (inputs[0].grad, 1.0)),
        (norm.weight.grad, (inputs[1].grad, 7.0)),
    ):
        torch.testing.assert_close(found.double(), wide, rtol=4 * near, atol=4 * near * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_with_fused_norms_says_what_it_said(dtype: torch.dtype) -> None:
    model = small.llama().to(dtype)
    tokens = torch.randint(3, small.VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    norm = model.model.layers[3].post_attention_layernorm
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    x = torch.randn(5, 32, dtype=dtype)
    with torch.no_grad():
        one, all_of_them = norm(x), model(tokens).logits
        fuse_norms(model)
        fused_one, fused = norm(x), model(tokens).logits
        restore_norms(model)
        restored = model(tokens).logits
    near = PRECISION[dtype]
    torch.testing.assert_close(fused_one, one, rtol=2 * near, atol=0)
    spread = all_of_them.float().std()
    assert (fused - all_of_them).float().std() < 16 * near * spread
    if dtype == torch.bfloat16:  # one rounding less
        assert not torch.equal(fused, all_of_them)
    assert torch.equal(restored, all_of_them)
