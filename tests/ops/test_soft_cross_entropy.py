"""The loss of training and its gradient, by torch and by the kernel, against autograd."""

import pytest
import torch

from tests.ops.setups import DEVICE, on_device
from vllm_eagle3.ops import dispatch, fuses_cross_entropy, soft_cross_entropy

IMPLS = on_device("torch", "triton")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")
# Less than a block of the kernel, a block and one column more or less, two and one more.
SIZES = [1, 7, 128, 1023, 1025, 2049]


def case(vocab_size: int, num_rows: int = 5, dtype=torch.float32, spread: float = 4.0):
    """Logits, those of the target in another order and number, and what each row weighs."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = spread * torch.randn(num_rows, vocab_size, generator=generator)
    target = spread * torch.randn(num_rows + 3, vocab_size, generator=generator)
    rows = torch.randperm(num_rows + 3, generator=generator)[:num_rows]
    weights = torch.rand(num_rows, generator=generator)
    weights[1:2] = 0
    return [t.to(DEVICE) for t in (logits.to(dtype), target.to(dtype), rows, weights)]


def definition(logits, target, rows, weights, top=None, top_weights=None):
    """In float64, the gradient by autograd."""
    x = logits.double().requires_grad_()
    p, log_q = target.double()[rows].softmax(-1), x.log_softmax(-1)
    terms = -p * log_q.where(p > 0, 0)
    loss, tops = (terms.sum(-1) * weights).sum(), None
    if top is not None:
        tops = terms.gather(-1, top).sum(-1)
        loss = loss + (tops * top_weights).sum()
    loss.backward()
    return terms.sum(-1), tops, logits.argmax(-1), target.argmax(-1)[rows], x.grad


def check(logits, *given, impl: str, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    losses, tops, drafted, expected, gradient = definition(logits, *given)
    untouched, written = logits.clone(), logits.clone()
    for result in (
        soft_cross_entropy(untouched, *given, with_gradient=False, impl=impl),
        soft_cross_entropy(written, *given, with_gradient=True, impl=impl),
    ):
        torch.testing.assert_close(result.losses_M.double(), losses, rtol=rtol, atol=atol)
        assert torch.equal(result.drafted_M, drafted)
        assert torch.equal(result.agree_M, drafted == expected)
        if tops is None:
            assert result.top_losses_M is None
        else:
            torch.testing.assert_close(result.top_losses_M.double(), tops, rtol=rtol, atol=atol)
    assert torch.equal(untouched, logits)
    # float32 to a few of its own steps; narrower types to the one that rounding takes.
    near = {"rtol": 1e-5, "atol": 1e-6} if written.dtype == torch.float32 else {}
    torch.testing.assert_close(written, gradient.to(written.dtype), **near)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_losses_gradients_and_measures_equal_the_definition(impl, dtype, vocab_size) -> None:
    check(*case(vocab_size, dtype=dtype), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab_size", [8191, 8192, 8193, 20_001])
def test_large_vocabularies(impl, vocab_size) -> None:
    check(*case(vocab_size, 2), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_top", [1, 3, 10, 16])
def test_a_term_of_the_top_tokens(impl, num_top) -> None:
    logits, target, rows, weights = case(1500)
    top = target[rows].topk(num_top).indices
    check(logits, target, rows, weights, top, weights.flip(0), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(impl, num_rows) -> None:
    logits, target, rows, weights = case(300, num_rows)
    check(logits, target, rows, weights, impl=impl)
    check(logits, target, rows, weights, target[rows].topk(2).indices, weights, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_types_of_draft_and_target_may_differ(impl) -> None:
    logits, target, rows, weights = case(200)
    check(logits.bfloat16(), target, rows.int(), weights, impl=impl)
    check(logits, target.half(), rows, weights, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(impl, dtype) -> None:
    """Sure of one token to an underflow of all others; sure of different ones."""
    logits, target, rows, weights = case(1200, dtype=dtype, spread=1e4)
    target[rows[2]] = logits[2]
    logits[3] += 1e4
    # Of losses of 1e4 float32 has a thousandth.
    check(logits, target, rows, weights, impl=impl, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_small_loss_of_large_logits_keeps_its_digits(impl) -> None:
    """A logit less the log-sum-exp would be off by a thousandth."""
    logits, target, rows, weights = case(1200)
    logits[:, 700] = 25
    logits += 8192
    target[rows] = logits
    losses = definition(logits, target, rows, weights)[0]
    assert (losses < 1e-2).all()
    found = soft_cross_entropy(logits, target, rows, weights, with_gradient=True, impl=impl)
    torch.testing.assert_close(found.losses_M.double(), losses, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_that_the_target_rules_out(impl) -> None:
    logits, target, rows, weights = case(1100)
    target[:, ::2] = -INF
    target[rows[0], :1030] = -INF  # whole lanes of the kernel's first steps
    check(logits, target, rows, weights, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_equal_logits_the_first_is_the_most_likely(impl) -> None:
    """In bfloat16, as it happens; the second to last of them in another step of the kernel."""
    logits, target, rows, weights = case(2100, 4, torch.bfloat16)
    for row, columns in enumerate([(3, 1027, 2090), (1027, 1028), (0, 2099), (1500, 476, 1023)]):
        logits[row, list(columns)] = 50.0
        target[rows[row], list(columns)] = 50.0
    target[rows[3], 476] = 49.0
    result = soft_cross_entropy(logits, target, rows, weights, with_gradient=True, impl=impl)
    assert result.drafted_M.tolist() == [3, 1027, 0, 476]
    assert result.agree_M.tolist() == [True, True, True, False]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("of_target", [False, True])
def test_what_is_not_finite_does_not_pass_for_a_loss(impl, value, of_target) -> None:
    logits, target, rows, weights = case(1100)
    (target[rows[4]] if of_target else logits[4])[1050] = value
    if of_target:
        target[rows[4], 1050] = value
    result = soft_cross_entropy(logits, target, rows, weights, with_gradient=True, impl=impl)
    assert result.losses_M.isfinite().tolist() == [True] * 4 + [False]
    assert not logits[4].isfinite().all()
    assert logits[:4].isfinite().all()
    assert (result.drafted_M >= 0).all()
    assert (result.drafted_M < 1100).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_a_wider_matrix(impl) -> None:
    logits, target, rows, weights = case(130)
    wide = torch.full((5, 200), 7.0, device=DEVICE)
    wide[:, :130] = logits
    soft_cross_entropy(wide[:, :130], target, rows, weights, with_gradient=True, impl=impl)
    torch.testing.assert_close(wide[:, :130], definition(logits, target, rows, weights)[4].float())
    assert (wide[:, 130:] == 7).all()


def test_the_kernel_takes_what_it_can_and_torch_the_rest(monkeypatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert fuses_cross_entropy(cuda, torch.bfloat16, torch.float32)
    assert not fuses_cross_entropy(cuda, torch.float64, torch.bfloat16)
    assert not fuses_cross_entropy(cpu, torch.bfloat16, torch.float32)
    logits, target, rows, weights = case(40, dtype=torch.float64)
    check(logits, target, rows, weights.double(), impl="auto", rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="takes bfloat16, float16 or float32"):
        soft_cross_entropy(
            logits, target, rows, weights.double(), with_gradient=True, impl="triton"
        )
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert not fuses_cross_entropy(cuda, torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="needs the package triton"):
        fuses_cross_entropy(cuda, torch.bfloat16, torch.float32, impl="triton")


def test_wrong_arguments_are_named() -> None:
    logits, target, rows, weights = case(9)
    right = {"logits_MV": logits, "target_PV": target, "rows_M": rows, "weights_M": weights}
    right |= {"top_MK": target[rows].topk(2).indices, "top_weights_M": weights}
    soft_cross_entropy(**right, with_gradient=False)
    for changes, message in (
        ({"logits_MV": logits.int()}, "logits_MV must be"),
        ({"target_PV": target[:, :-1]}, "target_PV must be a matrix of 9 columns"),
        ({"rows_M": rows[:-1]}, "rows_M must be a contiguous vector of at least 5"),
        ({"weights_M": weights.double()}, "weights_M must be torch.float32"),
        ({"top_MK": None}, "together"),
        ({"top_MK": right["top_MK"][:3]}, "for each of 5 rows"),
        ({"top_weights_M": weights.half()}, "top_weights_M must be torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_cross_entropy(**(right | changes), with_gradient=False)
