"""The joint attention of flash kernel and diagonal equals the explicit softmax."""

import pytest
import torch

from vllm_eagle3.train.attention import check_flash, diagonal_attention


def inputs(num_steps: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_steps)
    shape = 2, 3, 37, 16
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        for _ in range(3 + 2 * num_steps)
    ]


def explicit(num_steps: int, tensors: list[torch.Tensor]) -> torch.Tensor:
    """One softmax over [keys of step 0 | keys of steps 1..k], all slots visible or not."""
    q = tensors[0]
    keys = [tensors[1], *tensors[3 : 3 + num_steps]]
    values = [tensors[2], *tensors[3 + num_steps :]]
    slots = q.shape[2]
    visible = [torch.ones(slots, slots, dtype=torch.bool).tril()]
    visible += [torch.eye(slots, dtype=torch.bool)] * num_steps
    scores = q @ torch.cat(keys, 2).transpose(2, 3) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~torch.cat(visible, 1), -torch.inf).softmax(-1)
    return weights @ torch.cat(values, 2)


@pytest.mark.parametrize("impl", ["flash", "math"])
@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_output_and_all_gradients_equal_the_explicit_softmax(impl: str, num_steps: int) -> None:
    tensors = inputs(num_steps, torch.float64)
    upstream = torch.randn(tensors[0].shape, dtype=torch.float64)
    out = diagonal_attention(
        *tensors[:3], tensors[3 : 3 + num_steps], tensors[3 + num_steps :], impl
    )
    expected = explicit(num_steps, tensors)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(out, tensors, upstream),
        torch.autograd.grad(expected, tensors, upstream),
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.parametrize("impl", ["flash", "math"])
def test_the_layout_of_tensors_in_memory_does_not_matter(impl: str) -> None:
    tensors, num_steps = inputs(2, torch.float64), 2
    upstream = torch.randn(tensors[0].shape, dtype=torch.float64)
    results = []
    for layouts in ([False] * 8, [True] * 8, [True, False] * 4, [False, False, True, True] * 2):
        given = [
            (x.transpose(1, 2).contiguous().transpose(1, 2) if btnd else x).detach()
            for x, btnd in zip([*tensors, upstream], layouts, strict=True)
        ]
        *given, grad = [x.requires_grad_() for x in given]
        out = diagonal_attention(*given[:3], given[3 : 3 + num_steps], given[3 + num_steps :], impl)
        results.append([out, *torch.autograd.grad(out, given, grad.detach())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="'flash' or 'math'"):
        diagonal_attention(*inputs(0, torch.float32), [], [], "fast")


@pytest.mark.gpu
def test_on_cuda_bfloat16_is_as_exact_as_bfloat16_allows() -> None:
    exact = inputs(3, torch.float64)
    upstream = torch.randn(exact[0].shape, dtype=torch.float64)
    expected = [explicit(3, exact)]
    expected += torch.autograd.grad(expected[0], exact, upstream)
    errors = {}
    for impl in ("flash", "math"):
        tensors = [t.detach().to("cuda", torch.bfloat16).requires_grad_() for t in exact]
        out = diagonal_attention(*tensors[:3], tensors[3:6], tensors[6:], impl)
        got = [out, *torch.autograd.grad(out, tensors, upstream.to("cuda", torch.bfloat16))]
        errors[impl] = [
            (a.double().cpu() - b).abs().max() for a, b in zip(got, expected, strict=True)
        ]
    for flash, math in zip(errors["flash"], errors["math"], strict=True):
        assert flash <= 2 * math + 1e-3


@pytest.mark.parametrize(
    ("head_dim", "capability", "problem"),
    [
        (128, (7, 5), "needs compute capability 8.0, this GPU has 7.5"),
        (100, (9, 0), "multiples of 8 up to 256 .*not 100"),
        (264, (9, 0), "multiples of 8 up to 256 .*not 264"),
        (256, (8, 9), "multiples of 8 up to 192 .*not 256"),
    ],
)
def test_what_the_flash_kernel_cannot_take_is_refused_with_the_other_choice(
    head_dim: int, capability: tuple[int, int], problem: str
) -> None:
    with pytest.raises(ValueError, match=f"{problem}.*--attention math"):
        check_flash(head_dim, capability)


@pytest.mark.parametrize(("head_dim", "capability"), [(64, (8, 0)), (256, (9, 0)), (192, (8, 9))])
def test_what_the_flash_kernel_can_take_passes(head_dim: int, capability: tuple[int, int]) -> None:
    check_flash(head_dim, capability)
