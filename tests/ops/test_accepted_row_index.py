"""The gather that brings the accepted path's rows to the front."""

import pytest
import torch

from tests.ops.setups import ALL_IMPLS, DEVICE, Batch, int32, mixed_batch, random_paths
from vllm_eagle3.ops import accepted_row_index


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("num_nodes", [2, 9, 64])
@pytest.mark.parametrize("seed", range(3))
def test_mixed_batch(impl, seed, num_nodes):
    batch = mixed_batch(seed, num_slots=9, num_nodes=num_nodes)
    path_RN, path_len_R, paths = random_paths(seed, batch, 9, num_nodes)
    index = accepted_row_index(
        path_RN, path_len_R, **batch.rows, num_tokens=batch.num_tokens, impl=impl
    )
    expected = list(range(batch.num_tokens))
    for root, path in zip(batch.roots, paths, strict=True):
        expected[root : root + len(path)] = [root + node for node in path]
    assert index.dtype == torch.int64
    assert index.tolist() == expected


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_a_path_of_another_step_stays_in_its_request(impl):
    """A slot whose path is longer than this step's rows, as after preemption."""
    batch = Batch([0, 1], [0, 0], [2, 3])
    paths, lengths = int32([[0, 3, 5, 7]] * 2), int32([4, 4])
    index = accepted_row_index(paths, lengths, **batch.rows, num_tokens=5, impl=impl)
    assert index.tolist() == [0, 1, 2, 3, 4]


def test_wrong_arguments_are_named():
    batch = Batch([0], [0], [2])
    with pytest.raises(ValueError, match="path_len_R"):
        accepted_row_index(int32([[0, 1]]), int32([]), **batch.rows, num_tokens=2)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("room", [0, 5])
def test_token_ids_are_reordered_in_place(impl, dtype, room):
    batch = mixed_batch(3, num_slots=9, num_nodes=33)
    path_RN, path_len_R, _ = random_paths(3, batch, 9, 33)
    last_row = batch.num_tokens - batch.spare
    ids = torch.arange(100, 100 + last_row + room, dtype=dtype, device=DEVICE)
    before = ids.clone()
    index = accepted_row_index(
        path_RN,
        path_len_R,
        **batch.rows,
        num_tokens=batch.num_tokens,
        token_ids_T=ids,
        impl=impl,
    )
    assert torch.equal(ids[:last_row], before[index[:last_row]])
    assert torch.equal(ids[last_row:], before[last_row:])
