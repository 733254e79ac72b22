"""Keys of the own slot join an attention that is there, and leave their gradients."""

import pytest
import torch

from tests.ops.setups import DEVICE, on_device
from vllm_eagle3.ops import add_diagonal, diagonal_gradients

IMPLS = on_device("torch", "triton")
PRECISION = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


class Case:
    """Attention to three keys that all slots see, and to ``num_steps`` of their own."""

    def __init__(self, num_steps: int, dtype: torch.dtype, head_dim: int = 16, as_btnd=True):
        generator = torch.Generator().manual_seed(head_dim + num_steps)
        B, T, N = 2, 37, 3
        shape = (B, T, N, head_dim) if as_btnd else (B, N, T, head_dim)

        def rounded() -> torch.Tensor:
            x = torch.randn(shape, generator=generator).to(DEVICE, dtype)
            return x.transpose(1, 2) if as_btnd else x

        self.query, self.grad = rounded(), rounded()
        self.keys = [rounded() for _ in range(num_steps)]
        self.values = [rounded() for _ in range(num_steps)]
        self.shared = torch.randn(2, B, N, 3, head_dim, generator=generator).to(DEVICE, dtype)

    def definition(self):
        """In float64: attention to the shared keys, its log-sum-exp, and so for all of them."""
        leaves = [self.query, *self.keys, *self.values]
        query, *own = leaves = [x.double().requires_grad_() for x in leaves]
        keys, values = own[: len(own) // 2], own[len(own) // 2 :]
        scale = query.shape[-1] ** -0.5
        key, value = self.shared.double()
        scores = query @ key.mT * scale
        before = scores.softmax(-1) @ value, scores.logsumexp(-1)
        later = [(query * key).sum(-1, keepdim=True) * scale for key in keys]
        all_scores = torch.cat([scores, *later], -1)
        weights = all_scores.softmax(-1)
        out = weights[..., :3] @ value
        for step, value_of_step in enumerate(values):
            out = out + weights[..., 3 + step, None] * value_of_step
        gradients = torch.autograd.grad(out, leaves, self.grad.double())
        return before, (out, all_scores.logsumexp(-1)), gradients


def close(found, expected, dtype: torch.dtype) -> None:
    near = PRECISION[dtype]
    torch.testing.assert_close(found.double(), expected.detach(), rtol=4 * near, atol=4 * near)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(("num_steps", "head_dim"), [(1, 16), (3, 64), (6, 20)])
@pytest.mark.parametrize("as_btnd", [True, False])
def test_outputs_and_gradients_are_the_definitions(
    impl, dtype, num_steps, head_dim, as_btnd
) -> None:
    case = Case(num_steps, dtype, head_dim, as_btnd)
    (out, lse), (joint_out, joint_lse), gradients = case.definition()
    own = case.keys, case.values
    given = out.to(dtype).clone(), lse.float().clone()
    found = add_diagonal(case.query, *given, *own, impl=impl)
    close(found[0], joint_out, dtype)
    torch.testing.assert_close(found[1].double(), joint_lse, rtol=0, atol=4 * PRECISION[dtype])
    # Of the shared keys a flash kernel gives the gradient; nothing of it is known here.
    rest = torch.randn_like(case.query)
    exact = joint_out.to(dtype), joint_lse.float()
    query_grad, key_grads, value_grads = diagonal_gradients(
        case.grad, case.query, *exact, *own, rest.clone(), impl=impl
    )
    for grad, expected in zip([*key_grads, *value_grads], gradients[1:], strict=True):
        close(grad, expected, dtype)
    close(query_grad, rest.double() + shares_of_queries(case, *exact), dtype)


def shares_of_queries(case: Case, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """What the own keys give to the gradient of the queries, key by key."""
    query, grad = case.query.double(), case.grad.double()
    scale = query.shape[-1] ** -0.5
    total = torch.zeros_like(query)
    for key, value in zip(case.keys, case.values, strict=True):
        weight = ((query * key.double()).sum(-1) * scale - lse.double()).exp()
        change = weight * (grad * (value.double() - out.double())).sum(-1) * scale
        total += change.unsqueeze(-1) * key.double()
    return total


@pytest.mark.parametrize("impl", IMPLS)
def test_a_key_that_outweighs_all_others(impl) -> None:
    case = Case(2, torch.float32)
    case.keys[0] = case.query * 1e3
    (out, lse), (joint_out, joint_lse), _ = case.definition()
    found = add_diagonal(case.query, out.float(), lse.float(), case.keys, case.values, impl=impl)
    close(found[0], joint_out, torch.float32)
    torch.testing.assert_close(found[1].double(), joint_lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_later_steps_nothing_changes(impl) -> None:
    case = Case(0, torch.float32)
    out, lse = torch.randn_like(case.query), torch.randn_like(case.query[..., 0])
    found = add_diagonal(case.query, out.clone(), lse.clone(), [], [], impl=impl)
    assert torch.equal(found[0], out)
    assert torch.equal(found[1], lse)
    grad, *of_steps = diagonal_gradients(case.grad, case.query, out, lse, [], [], out, impl=impl)
    assert torch.equal(grad, out)
    assert of_steps == [[], []]


def test_wrong_arguments_are_named() -> None:
    case = Case(2, torch.float32)
    out, lse = torch.randn_like(case.query), torch.randn_like(case.query[..., 0])
    for arguments, message in (
        ((case.query, out, lse, case.keys, case.values[:1]), "2 and 1 steps"),
        ((case.query, out.half(), lse, case.keys, case.values), "queries are torch.float32"),
        ((case.query, out, lse.mT, case.keys, case.values), "lse_BNT must be"),
    ):
        with pytest.raises(ValueError, match=message):
            add_diagonal(*arguments)
    doubles = [x.double() for x in (case.query, out, lse)], [[x.double()] for x in (out, out)]
    with pytest.raises(ValueError, match='use impl="auto"'):
        add_diagonal(*doubles[0], *doubles[1], impl="triton")
