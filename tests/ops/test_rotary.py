"""Pairs of channels turn by their angles, and back."""

import pytest
import torch

from tests.ops.setups import DEVICE, on_device
from vllm_eagle3.ops import rotate_halves

IMPLS = on_device("torch", "triton")
PRECISION = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def case(head_dim: int, dtype: torch.dtype, num_angles: int):
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(2, 37, 3, head_dim, generator=generator).to(DEVICE, dtype)
    angles = 9 * torch.randn(num_angles, 37, head_dim // 2, generator=generator).repeat(1, 1, 2)
    return x, angles.cos().to(DEVICE), angles.sin().to(DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("head_dim", [2, 20, 64])
@pytest.mark.parametrize("num_angles", [1, 2])
def test_pairs_turn_as_complex_numbers(impl, dtype, head_dim, num_angles) -> None:
    x, cos, sin = case(head_dim, dtype, num_angles)
    half = head_dim // 2
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())
    turns = torch.complex(cos[..., :half].double(), sin[..., :half].double()).unsqueeze(2)
    for inverse, expected in ((False, numbers * turns), (True, numbers * turns.conj())):
        found = rotate_halves(x, cos, sin, inverse=inverse, impl=impl)
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(),
            torch.cat((expected.real, expected.imag), -1),
            rtol=PRECISION[dtype],
            atol=PRECISION[dtype],
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_view_of_another_layout(impl) -> None:
    x, cos, sin = case(16, torch.float32, 1)
    view = x.transpose(1, 2).contiguous().transpose(1, 2)
    found = rotate_halves(view, cos, sin, impl=impl)
    assert found.is_contiguous()
    torch.testing.assert_close(found, rotate_halves(x, cos, sin, impl="torch"))
    assert rotate_halves(x[:0], cos, sin, impl=impl).shape == (0, 37, 3, 16)


@pytest.mark.parametrize("impl", IMPLS)
def test_some_heads_of_each_slot(impl) -> None:
    x, cos, sin = case(16, torch.float32, 1)
    expected = rotate_halves(x, cos, sin, impl="torch")
    for part in (slice(0, 2), slice(1, 2), slice(1, 3)):
        found = rotate_halves(x[:, :, part], cos, sin, impl=impl)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected[:, :, part])


def test_wrong_arguments_are_named() -> None:
    x, cos, sin = case(16, torch.float32, 1)
    for arguments, message in (
        ((x, cos[:, :5], sin), "cos_BTD must be"),
        ((x, cos, sin.half()), "sin_BTD must be torch.float32"),
        ((x, cos.expand(2, -1, -1), sin), "one shape"),
        ((x[..., :15], cos[..., :15], sin[..., :15]), "D even"),
    ):
        with pytest.raises(ValueError, match=message):
            rotate_halves(*arguments)
    with pytest.raises(ValueError, match='use impl="auto"'):
        rotate_halves(x.double(), cos.double(), sin.double(), impl="triton")
