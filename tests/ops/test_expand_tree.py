"""Levels offered in place against the reference expansion, exactly."""

import pytest
import torch

from tests.ops.rounds import MAX_POSITION, SENTINEL, STATIC, WHERE, Round, random_round
from vllm_eagle3 import ops
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.ops.expand_tree import pool_size

# Depth, top-k: one level, chains, the default, and the widest trees that 64 bits allow.
SHAPES = [(1, 1), (1, 5), (65, 1), (3, 4), (6, 8), (4, 11), (5, 16), (2, 64), (3, 32)]


def check_level(case: Round, level: int) -> None:
    """All that the op writes, and that it writes nothing else."""
    B, K, growth = case.num_reqs, case.config.top_k, case.growth
    expected = case.expected(level)
    offered = expected.tokens_BC.shape[1]
    for name in ("tokens_BC", "scores_BC", "parents_BC"):
        found = getattr(growth, name).cpu()
        assert torch.equal(found[:B, :offered], getattr(expected, name)), name
        assert found[B:].eq(SENTINEL).all()
        assert found[:, offered:].eq(SENTINEL).all()
    for name in ("frontier_scores_BK", "frontier_index_BK", "frontier_bits_BK"):
        found = getattr(growth, name).cpu()
        assert torch.equal(found[:B], getattr(expected, name).to(found.dtype)), name
        assert found[B:].eq(SENTINEL).all()
    requests_B1 = torch.arange(B).unsqueeze(1)
    first_row_B1 = requests_B1 if level == 1 else requests_B1 * K
    assert torch.equal(growth.frontier_row_BK[:B].cpu(), first_row_B1 + expected.frontier_parent_BK)
    ids, positions = case.input_ids_M.cpu(), case.positions_M.cpu()
    assert torch.equal(ids[: B * K], expected.frontier_tokens_BK.flatten().to(ids.dtype))
    at_B = [min(root + level - 1, MAX_POSITION) for root in case.root_positions_B.tolist()]
    assert positions[: B * K].tolist() == [at for at in at_B for _ in range(K)]
    assert ids[B * K :].eq(SENTINEL).all()
    assert positions[B * K :].eq(SENTINEL).all()


@pytest.mark.parametrize("kind", ["random", "ties", "all equal", "spoiled"])
@pytest.mark.parametrize(("depth", "top_k"), SHAPES)
@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_every_level_equals_the_reference(impl, device, depth, top_k, kind):
    config = TreeConfig(1, depth, top_k)
    case = random_round(
        config,
        impl,
        device,
        batch=7 if top_k < 16 else 2,
        seed=depth + top_k,
        step={"ties": 0.5, "all equal": 100.0}.get(kind),
        spoiled=kind == "spoiled",
    )
    for level in range(1, depth + 1):
        case.offer(level)
        if level < 9 or level == depth:
            check_level(case, level)


@pytest.mark.parametrize(("impl", "device"), WHERE)
@pytest.mark.parametrize("config", STATIC.values(), ids=STATIC)
def test_every_level_of_a_static_tree(impl, device, config):
    case = random_round(config, impl, device, batch=5, seed=1, spoiled=True)
    for level in range(1, config.depth + 1):
        case.offer(level)
        check_level(case, level)


@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_a_full_batch_and_long_ids(impl, device):
    config = TreeConfig(5, 2, 3)
    case = random_round(config, impl, device, batch=130, spare=0, ids_dtype=torch.int64)
    case.offer_all()
    check_level(case, 2)


@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_an_empty_batch_changes_nothing(impl, device):
    case = random_round(TreeConfig(5, 2, 3), impl, device)
    case.num_reqs = 0
    case.offer(1)
    case.offer(2)
    assert all(rows.eq(SENTINEL).all() for rows in case.buffers())
    assert case.input_ids_M.eq(SENTINEL).all()


def test_a_frontier_that_the_kernel_cannot_hold_is_torchs():
    config = TreeConfig(5, 1, 65)
    case = random_round(config, "auto", "cpu").offer_all()
    check_level(case, 1)
    case.impl = "extension"
    with pytest.raises(ValueError, match=r"top_k of at most 64, got 65: use impl=\"auto\""):
        case.offer(1)


def test_pool_size_is_the_configs():
    for depth, top_k in SHAPES:
        assert pool_size(depth, top_k) == TreeConfig(1, depth, top_k).num_candidates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 0}, "level must be at least 1"),
        ({"level": 3}, "level=3 offers candidates up to 21, growth holds 12"),
        ({"num_reqs": 6}, "num_reqs must be between 0 and 5"),
        ({"num_reqs": 4}, r"log_probs_MK must be at least \[12, 3\]"),
        ({"tokens_MK": torch.zeros(9, 2, dtype=torch.int64)}, "tokens_MK must be at least"),
        ({"log_probs_MK": torch.zeros(9, 3).bfloat16()}, "log_probs_MK must be torch.float32"),
        ({"input_ids_M": torch.zeros(9)}, "input_ids_M must be torch.int32 or torch.int64"),
        ({"positions_M": torch.zeros(8, dtype=torch.int64)}, "positions_M must be a contiguous"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    case = random_round(TreeConfig(5, 2, 3), "torch", "cpu")
    arguments = {
        "growth": case.growth,
        "log_probs_MK": case.levels[1][0].view(9, 3),
        "tokens_MK": case.levels[1][1].view(9, 3),
        "level": 2,
        "num_reqs": 3,
        "root_positions_B": torch.zeros(5, dtype=torch.int64),
        "max_position": MAX_POSITION,
        "input_ids_M": case.input_ids_M,
        "positions_M": case.positions_M,
    }
    with pytest.raises(ValueError, match=message):
        ops.expand_tree(**arguments | change)
