"""The input of the head's fc layer: gather, norm and concatenation in one."""

import pytest
import torch

from tests.ops.setups import DEVICE, int32, int64, on_device
from vllm_eagle3.ops import fuse_features

IMPLS = on_device("torch", "extension")
EPS = 1e-5
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As vLLM rounds it, for inputs of type ``x.dtype`` and arithmetic in ``dtype``."""
    wide = x.to(dtype)
    wide = wide / (wide.pow(2).mean(dim=1, keepdim=True) + EPS).sqrt()
    return wide.to(x.dtype) * weight if dtype != torch.float64 else wide * weight.double()


def fuse(states, index, weights, impl, columns=0, rows=None):
    """In an output with ``columns`` more columns, which must stay as they are."""
    width = len(states) * states[0].shape[1]
    rows = rows if index is None else index.shape[0]
    room = torch.full((rows, width + columns), 7.0, dtype=states[0].dtype, device=DEVICE)
    fuse_features(states, index, weights, EPS, room[:, :width], impl=impl)
    assert room[:, width:].eq(7).all()
    return room[:, :width]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("hidden", [1, 7, 64, 100, 2056])
def test_rows_side_by_side(impl, dtype, hidden):
    states = [randn(seed, 9, hidden, dtype=dtype) for seed in range(3)]
    index = int64([8, 0, 0, 3, 5])
    expected = torch.cat([state[index] for state in states], dim=1)
    assert torch.equal(fuse(states, index, [], impl, columns=3), expected)
    assert torch.equal(fuse(states, index.int(), [], impl), expected)
    assert torch.equal(fuse(states, None, [], impl, rows=4), torch.cat(states, dim=1)[:4])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("hidden", [5, 64, 2056])
def test_norms(impl, dtype, joint, hidden):
    """Error within twice that of the norm in plain torch; rows of quite different size."""
    states = [randn(seed, 6, hidden, dtype=dtype) * 10**seed for seed in range(3)]
    weights = [randn(9, 3 * hidden, dtype=dtype)]
    if not joint:
        weights = [weights[0][s * hidden : (s + 1) * hidden].clone() for s in range(3)]
    index = int32([5, 5, 1, 0])

    def by_the_book(arithmetic: torch.dtype) -> torch.Tensor:
        rows = [state[index] for state in states]
        if joint:
            return rms_norm(torch.cat(rows, dim=1), weights[0], arithmetic)
        normed = [rms_norm(x, w, arithmetic) for x, w in zip(rows, weights, strict=True)]
        return torch.cat(normed, dim=1)

    exact = by_the_book(torch.float64)
    allowed = 2 * (by_the_book(torch.float32).double() - exact).abs().max()
    # In few elements torch may err by less than its reciprocal square root does.
    allowed += 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    found = fuse(states, index, weights, impl, columns=8)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("impl", IMPLS)
def test_one_state_and_strided_states(impl):
    wide = randn(0, 4, 48, dtype=torch.bfloat16)
    states = [wide[:, 16:32], wide[:, 1:17]]
    expected = torch.cat(states, dim=1)
    assert torch.equal(fuse(states, None, [], impl, rows=4), expected)
    assert torch.equal(fuse(states[:1], None, [], impl, rows=4), states[0])
    weight = randn(1, 16, dtype=torch.bfloat16)
    normed = fuse(states[:1], None, [weight], impl, rows=4)
    assert torch.equal(normed, fuse([states[0].contiguous()], None, [weight], impl, rows=4))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_norm_rounds_before_the_weight_and_after_it(impl):
    """In bfloat16 3 / rms = 1.0 + 2^-9 is 1, and so is a product of just over 1.5 times that."""
    x = torch.tensor([[3.0, 3.0, 2.96875, 2.96875]], dtype=torch.bfloat16, device=DEVICE)
    weight = torch.tensor([1.5, 1.0, 1.5, 3.0], dtype=torch.bfloat16, device=DEVICE)
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean() + EPS)
    expected = scaled.bfloat16() * weight
    assert not torch.equal(expected, (scaled * weight.float()).bfloat16())
    assert torch.equal(fuse([x], None, [weight], impl, rows=1), expected)


def test_wrong_arguments_are_named():
    def call(**changed):
        arguments = {
            "states": [torch.ones(4, 8)] * 2,
            "index_T": torch.zeros(3, dtype=torch.int64),
            "norm_weights": [],
            "eps": EPS,
            "out_TF": torch.zeros(3, 16),
        }
        fuse_features(**(arguments | changed))

    call()
    for changed in (
        {"states": []},
        {"states": [torch.ones(4, 8, dtype=torch.int32)] * 2},
        {"states": [torch.ones(4, 8), torch.ones(4, 8).half()]},
        {"states": [torch.ones(4, 8), torch.ones(5, 8)]},
        {"index_T": torch.zeros(2, dtype=torch.int64)},
        {"index_T": torch.zeros(3)},
        {"norm_weights": [torch.ones(8)] * 3},
        {"norm_weights": [torch.ones(8)]},
        {"out_TF": torch.zeros(3, 24)},
        {"out_TF": torch.zeros(16, 3).T},
    ):
        with pytest.raises(ValueError, match=next(iter(changed))):
            call(**changed)
    with pytest.raises(ValueError, match="cannot fill"):
        call(index_T=None, out_TF=torch.zeros(5, 16))
    with pytest.raises(ValueError, match="impl must be one of"):
        call(impl="triton")
