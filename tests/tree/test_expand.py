import pytest
import torch

from tests.tree.naive import expand, naive_pool, random_levels
from vllm_eagle3.tree.expand import grow, start
from vllm_eagle3.tree.types import NO_PARENT


def test_hand_worked_example():
    # a: -1 -> c -0.5, d -3     b: -2 -> e -0.25, f -1
    expansion = start(torch.tensor([[-1.0, -2.0]]), torch.tensor([[10, 11]]))
    assert expansion.frontier_tokens_BK.tolist() == [[10, 11]]
    assert expansion.frontier_index_BK.tolist() == [[0, 1]]
    assert expansion.frontier_parent_BK.tolist() == [[0, 0]]
    assert expansion.frontier_bits_BK.tolist() == [[0b01, 0b10]]
    assert expansion.level == 1

    log_probs = torch.tensor([[[-0.5, -3.0], [-0.25, -1.0]]])
    expansion = grow(expansion, log_probs, torch.tensor([[[12, 13], [14, 15]]]))
    assert expansion.tokens_BC.tolist() == [[10, 11, 12, 13, 14, 15]]
    assert expansion.scores_BC.tolist() == [[-1.0, -2.0, -1.5, -4.0, -2.25, -3.0]]
    assert expansion.parents_BC.tolist() == [[NO_PARENT, NO_PARENT, 0, 0, 1, 1]]
    assert expansion.frontier_tokens_BK.tolist() == [[12, 14]]
    assert expansion.frontier_scores_BK.tolist() == [[-1.5, -2.25]]
    assert expansion.frontier_index_BK.tolist() == [[2, 4]]
    assert expansion.frontier_parent_BK.tolist() == [[0, 1]]
    assert expansion.frontier_bits_BK.tolist() == [[0b0101, 0b1010]]
    assert expansion.level == 2


@pytest.mark.parametrize(("depth", "top_k"), [(1, 1), (1, 5), (4, 1), (3, 4), (6, 8)])
@pytest.mark.parametrize("step", [None, 0.5, 4.0])
def test_pool_equals_the_naive_expansion(depth, top_k, step):
    levels = random_levels(seed=depth * top_k, batch=3, depth=depth, top_k=top_k, step=step)
    expansion = expand(levels)
    assert expansion.tokens_BC.shape == (3, top_k + (depth - 1) * top_k**2)
    for request in range(3):
        pool = naive_pool(levels, request)
        assert expansion.tokens_BC[request].tolist() == [c.token for c in pool]
        assert expansion.scores_BC[request].tolist() == [c.score for c in pool]
        assert expansion.parents_BC[request].tolist() == [c.parent for c in pool]


@pytest.mark.parametrize("step", [None, 0.5])
def test_frontier_tells_the_draft_where_its_state_is_and_whom_it_sees(step):
    depth, top_k = 7, 10  # the last frontier is numbered 60 to 69, beyond the 64 bits
    levels = random_levels(seed=1, batch=2, depth=depth, top_k=top_k, step=step)
    expansion = start(*levels[0])
    number_of = [{k: k for k in range(top_k)} for _ in range(2)]  # pool index -> number
    for level in levels[1:]:
        before = expansion
        expansion = grow(expansion, *level)
        for request in range(2):
            index = expansion.frontier_index_BK[request]
            pool_parents = expansion.parents_BC[request]
            old_row = expansion.frontier_parent_BK[request]
            assert torch.equal(before.frontier_index_BK[request][old_row], pool_parents[index])
            assert torch.equal(
                expansion.frontier_tokens_BK[request], expansion.tokens_BC[request][index]
            )
            assert torch.equal(
                expansion.frontier_scores_BK[request], expansion.scores_BC[request][index]
            )
            for row, candidate in enumerate(index.tolist()):
                number_of[request][candidate] = before.level * top_k + row
                seen = 0
                while candidate != NO_PARENT:
                    number = number_of[request][candidate]
                    seen |= 1 << number if number < 64 else 0
                    candidate = int(pool_parents[candidate])
                assert int(expansion.frontier_bits_BK[request, row]) % 2**64 == seen


def test_a_certain_token_rounded_above_zero_does_not_beat_its_parent():
    expansion = start(torch.tensor([[1e-6]]), torch.tensor([[3]]))
    expansion = grow(expansion, torch.tensor([[[1e-6]]]), torch.tensor([[[4]]]))
    assert expansion.scores_BC.tolist() == [[0.0, 0.0]]


def test_results_are_contiguous_and_of_the_stated_types():
    levels = random_levels(seed=0, batch=2, depth=3, top_k=4)
    expansion = expand([(lp.bfloat16(), tokens.int()) for lp, tokens in levels])
    assert expansion.scores_BC.dtype == torch.float32
    assert expansion.tokens_BC.dtype == torch.int64
    assert expansion.parents_BC.dtype == torch.int32
    assert expansion.frontier_bits_BK.dtype == torch.int64
    for name in ("tokens_BC", "scores_BC", "parents_BC"):
        assert getattr(expansion, name).is_contiguous()
