from types import SimpleNamespace

import pytest

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine.compat import BatchExecutionDescriptor, CUDAGraphMode
from vllm_eagle3.engine.draft_schedule import DraftSchedule

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


def schedule(ranges, most, max_num_reqs):
    config = SimpleNamespace(
        num_speculative_tokens=most, num_speculative_tokens_per_batch_size=ranges
    )
    return DraftSchedule(config, max_num_reqs)


def manager(lengths, batches):
    """What a manager of vLLM's plans: uniform batches of all sizes, and one of mixed requests."""
    full = [
        BatchExecutionDescriptor(FULL, length * batch, batch, uniform_token_count=length)
        for length in lengths
        for batch in batches
    ]
    mixed = BatchExecutionDescriptor(PIECEWISE, 64, None)
    candidates = {(d.num_tokens, 0): [d, mixed] for d in full}
    return SimpleNamespace(_capture_descs={FULL: full, PIECEWISE: [mixed]}, _candidates=candidates)


def test_one_size_without_a_schedule():
    one = schedule(None, 7, 100)
    assert [one.drafts(n) for n in (1, 100)] == [7, 7]
    config = TreeConfig(7, 3, 4, verify_budget=None)
    assert one.shapes(config, max_rows=1000) == {config: 100}
    assert one.shapes(config, max_rows=99) == {config: 24}


def test_trees_of_a_size_grow_for_as_many_requests_as_have_it():
    config = TreeConfig(15, 5, 8)
    several = schedule([[1, 3, 15], [4, 8, 7], [9, 64, 3]], 15, 64)
    assert [several.drafts(n) for n in (1, 3, 4, 8, 9, 64)] == [15, 15, 7, 7, 3, 3]
    # Three requests may be padded to four.
    expected = {config.tier(3): 64, config.tier(7): 8, config: 4}
    assert list(several.shapes(config, 4096).items()) == list(expected.items())


@pytest.mark.parametrize(("batches", "kept"), [
    ((1, 2, 4, 8), {(16, 1), (16, 2), (8, 4), (4, 8)}),
    # Three requests are padded to four, and have other trees.
    ((2, 4, 8), {(16, 2), (8, 4), (4, 8)}),
    ((4, 8), {(16, 4), (8, 4), (4, 8)}),
])  # fmt: skip
def test_rounds_are_captured_with_the_trees_of_their_batches(batches, kept):
    several = schedule([[1, 2, 15], [3, 4, 7], [5, 8, 3]], 15, 8)
    planned = manager((4, 8, 16), batches)
    several.keep_rounds(planned)
    full = planned._capture_descs[FULL]
    assert {(d.uniform_token_count, d.num_reqs) for d in full} == kept
    assert len(planned._capture_descs[PIECEWISE]) == 1
    for candidates in planned._candidates.values():
        assert candidates[-1].cg_mode == PIECEWISE
        assert set(candidates[:-1]) <= set(full)


def test_growth_is_captured_for_each_size_of_a_batch():
    several = schedule([[1, 2, 15], [3, 4, 7], [5, 6, 1], [7, 8, 0]], 15, 8)
    planned = manager((1,), (2, 4, 8))
    several.split_growth(planned)
    found = [(d.num_reqs, d.num_speculative_tokens) for d in planned._capture_descs[FULL]]
    assert found == [(2, 15), (4, 7)]


def test_no_growth_is_captured_where_no_scheduled_tree_has_a_second_level():
    single = schedule([[1, 8, 1]], 63, 8)
    planned = manager((1,), (2, 4, 8))
    single.split_growth(planned)
    assert planned._capture_descs[FULL] == []


def test_nothing_is_planned_where_nothing_is_captured():
    several = schedule([[1, 2, 15], [3, 8, 7]], 15, 8)
    eager = SimpleNamespace(_capture_descs={}, _candidates={})
    several.keep_rounds(eager)
    several.split_growth(eager)
    assert eager._capture_descs == {}
