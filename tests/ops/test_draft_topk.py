"""The draft's best children."""

import pytest
import torch

from tests.ops.rounds import WHERE
from vllm_eagle3.ops import draft_topk

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[pytest.param(p.values, id=p.id, marks=p.marks) for p in WHERE])
def where(request):
    """Implementation and device."""
    return request.param


def random_logits(seed: int, rows: int, vocab: int, scale: float = 9.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def check_best(logits: torch.Tensor, k: int, impl: str, device: str) -> torch.Tensor:
    """Values as a float64 log-softmax has them; ids that carry these values, none twice."""
    logits = logits.to(device)
    log_probs, ids = draft_topk(logits, k, impl=impl)
    assert log_probs.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert log_probs.is_contiguous()
    expected = logits.double().log_softmax(dim=1)
    plain = logits.float().log_softmax(dim=1)
    is_finite = expected.isfinite()
    plain_error = (plain - expected)[is_finite].abs().max()
    found = expected.gather(1, ids)
    # The k largest, in order; where logits are equal, any of them.
    assert torch.equal(found, expected.topk(k, dim=1).values)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert torch.equal(found.isfinite(), log_probs.isfinite())
    error = (log_probs - found)[found.isfinite()].abs()
    assert error.numel() == 0 or error.max() <= 2 * plain_error + 1e-6
    if impl == "extension":
        # No sort needs to know that zeros of either sign are equal.
        order = (logits.float() + 0.0).sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(ids, order[:, :k])
    return ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "k"), [(5, 999, 8), (1, 7, 7), (3, 4096, 1), (9, 65, 16)]
)
def test_equals_log_softmax_then_topk(where, dtype, rows, vocab, k):
    check_best(random_logits(0, rows, vocab).to(dtype), k, *where)


@pytest.mark.parametrize("vocab", [32_000, 128_256, 200_000])
def test_real_vocabularies(where, vocab):
    check_best(random_logits(vocab, 2, vocab).bfloat16(), 8, *where)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32_000, 49_152, 128_256])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 33, 64, 512])
def test_every_split_of_a_row(rows, vocab):
    """The kernel shares a row out among fewer blocks, the more rows there are."""
    logits = random_logits(rows, rows, vocab)
    for k, dtype in ((1, DTYPES[0]), (8, DTYPES[1]), (10, DTYPES[2]), (16, DTYPES[1])):
        check_best(logits.to(dtype), k, "extension", "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_rows_of_a_wider_buffer_at_any_address(where, dtype, first):
    """Neighbours of a row are better than all of it, and must not be taken."""
    impl, device = where
    wide = torch.full((4, 1013), 1e4, dtype=dtype, device=device)
    rows = wide[:, first : first + 777]
    rows.copy_(random_logits(first, 4, 777))
    log_probs, ids = draft_topk(rows, 8, impl=impl)
    alone_log_probs, alone_ids = draft_topk(rows.contiguous(), 8, impl=impl)
    assert torch.equal(ids, alone_ids)
    assert (log_probs - alone_log_probs).abs().max() <= 1e-5
    check_best(rows.cpu(), 8, *where)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [5, 16])
@pytest.mark.parametrize("step", [1.0, 8.0])
def test_ties(where, dtype, k, step):
    logits = (random_logits(k, 6, 3001) / step).round() * step
    check_best(logits.to(dtype), k, *where)


@pytest.mark.parametrize("value", [0.0, -0.0, -1e4])
def test_all_equal_repeats(where, value):
    impl, device = where
    logits = torch.full((4, 5000), value, device=device)
    logits[:, ::2] *= -1.0 if value == 0 else 1.0  # zeros of either sign are equal
    first = draft_topk(logits, 10, impl=impl)
    second = draft_topk(logits.clone(), 10, impl=impl)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    check_best(logits.cpu(), 10, *where)


def test_sorted_rows(where):
    """Rising logits replace the best so far at every step; falling ones never."""
    rising = torch.arange(20_000.0) / 1000
    check_best(torch.stack([rising, rising.flip(0), -rising]), 16, *where)


def test_most_logits_minus_infinity(where):
    logits = torch.full((3, 5000), -INF)
    logits[0, 4999] = 2.0
    logits[1, [3, 17, 4000]] = torch.tensor([1.0, 5.0, 1.0])
    logits[2, 100:107] = -300.0
    ids = check_best(logits, 7, *where)
    assert ids[0, 0] == 4999
    assert ids[1, 0] == 17


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_idle_slots_may_hold_anything(where, dtype):
    """NaN and infinities stay in their row, and ids stay in the vocabulary."""
    impl, device = where
    logits = random_logits(1, 7, 2500).to(dtype)
    logits[0, 1234] = NAN
    logits[1] = NAN
    logits[2] = -INF
    logits[3, 7] = INF
    logits[4] = INF
    logits[5, 3] = torch.finfo(dtype).max
    log_probs, ids = (values.cpu() for values in draft_topk(logits.to(device), 8, impl=impl))
    assert log_probs[:5].isnan().all()
    assert ids[3, 0] == 7
    assert ids[5, 0] == 3
    assert log_probs[5, 0] == 0
    assert ((ids >= 0) & (ids < 2500)).all()
    assert all(len(set(row)) == 8 for row in ids.tolist())
    check_best(logits[6:], 8, *where)


def test_offsets_lead_to_the_targets_tokens(where):
    impl, device = where
    logits = random_logits(2, 3, 700).to(device)
    offsets = torch.randint(0, 10**6, (700,), generator=torch.Generator().manual_seed(3)).to(device)
    log_probs, ids = draft_topk(logits, 6, impl=impl)
    with_offsets = draft_topk(logits, 6, offsets, impl=impl)
    assert torch.equal(with_offsets[0], log_probs)
    assert torch.equal(with_offsets[1], ids + offsets[ids])


def test_no_rows(where):
    impl, device = where
    log_probs, tokens = draft_topk(torch.empty(0, 50, device=device), 4, impl=impl)
    assert log_probs.shape == tokens.shape == (0, 4)


def test_auto_takes_more_children_and_other_layouts_than_the_kernel():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = random_logits(4, 50, 40).to(device)
    for case, k in ((logits, 30), (logits.T, 4), (logits.double(), 4)):
        log_probs, ids = draft_topk(case, k)
        assert torch.equal(case.gather(1, ids), case.topk(k, dim=1).values)
        assert log_probs.dtype == torch.float32


def test_the_kernel_refuses_what_only_torch_can_do():
    with pytest.raises(ValueError, match=r'at most 16 children .* got k=17, .* use impl="auto"'):
        draft_topk(torch.zeros(1, 30), 17, impl="extension")


@pytest.mark.parametrize("k", [0, 4])
def test_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match="k must be between 1 and the vocabulary of 3"):
        draft_topk(torch.zeros(1, 3), k)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="float matrix"):
        draft_topk(torch.zeros(1, 3, dtype=torch.int64), 1)


@pytest.mark.parametrize("offsets", [torch.zeros(2, dtype=torch.int64), torch.zeros(3)])
def test_offsets_of_another_kind_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets_V must be"):
        draft_topk(torch.zeros(1, 3), 1, offsets)
