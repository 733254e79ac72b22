"""Tree attention against attention by the book, row by row, in float64."""

import pytest
import torch

from tests.ops.setups import (
    DEVICE,
    IMPLS,
    NAN,
    Attention,
    ancestors,
    random_parents,
    trees,
    word,
    words,
)
from vllm_eagle3.ops import finish_tree_attention, tree_attention

# Prefixes: none, one token, inside a page, a full page, several pages.
PREFIXES = [0, 1, 17, 48]


def run(case: Attention, impl: str) -> torch.Tensor:
    out = torch.full_like(case.inputs["query_THD"], NAN)
    tree_attention(
        **case.inputs, out_THD=out, sliding_window=case.window, impl=impl, **case.settings
    )
    return out


def finish(case: Attention, impl: str, empty: float = float("-inf")) -> torch.Tensor:
    """The prefix by the book, rounded as a kernel would, and then the tree part."""
    prefix, lse = case.by_the_book(torch.float64, tree=False)
    out = prefix.to(case.dtype)
    out[(lse == float("-inf")).T] = NAN
    lse = lse.float().where(lse > float("-inf"), empty)
    names = ("key_cache", "value_cache", "block_table_BP", "prefix_lens_B")
    inputs = {name: value for name, value in case.inputs.items() if name not in names}
    finish_tree_attention(**inputs, out_THD=out, lse_HT=lse, impl=impl, **case.settings)
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("attend", [run, finish])
class TestBoth:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
    def test_head_dims_and_types(self, attend, impl, head_dim, dtype):
        case = Attention([0, 19], trees(3, 5), head_dim=head_dim, dtype=dtype)
        case.assert_right(attend(case, impl))

    @pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (4, 1), (16, 2)])
    def test_query_heads_share_a_key_head(self, attend, impl, heads, kv_heads):
        case = Attention([18, 3], trees(7, 4), heads=heads, kv_heads=kv_heads)
        case.assert_right(attend(case, impl))

    def test_prefixes_and_padding_requests(self, attend, impl):
        case = Attention([0, 5, *PREFIXES], [[], [], *trees(4, 1, 6, 3)])
        case.assert_right(attend(case, impl))

    def test_64_nodes(self, attend, impl):
        chain = list(range(-1, 63))
        case = Attention([20, 0], [words(chain), words(random_parents(1, 64))])
        assert case.seen[0][63] == -1
        case.assert_right(attend(case, impl))

    def test_softcap(self, attend, impl):
        case = Attention([21, 0], trees(5, 5), softcap=2.0)
        case.assert_right(attend(case, impl))

    def test_draft_rows_see_expanded_nodes_in_scratch(self, attend, impl):
        """K rows of the third level; the scratch buffer past its nodes is NaN."""
        parents = random_parents(3, 12)
        frontier = [word(ancestors(parents, node)) for node in range(8, 12)]
        case = Attention([33, 0, 7], [frontier, frontier, []], tree_keys=[12, 12, 0])
        case.assert_right(attend(case, impl))

    def test_a_row_that_sees_nothing_is_zero(self, attend, impl):
        case = Attention([0, 6], [[0, 1], [0, 1]])
        found = attend(case, impl)
        assert torch.equal(found[0], torch.zeros_like(found[0]))
        case.assert_right(found)

    @pytest.mark.parametrize("seed", range(3))
    def test_random_trees(self, attend, impl, seed):
        case = Attention([9, 30, 2], trees(17, 2, 9, seed=10 * seed), seed=seed)
        case.assert_right(attend(case, impl))

    def test_rows_of_no_request_are_left_alone(self, attend, impl):
        case = Attention([4], trees(3))
        case.inputs["query_THD"] = torch.cat([case.inputs["query_THD"]] * 2)
        case.inputs["ancestor_bits_T"] = torch.cat([case.inputs["ancestor_bits_T"]] * 2)
        found = attend(case, impl) if attend is run else None
        if found is None:
            out = torch.ones_like(case.inputs["query_THD"])
            lse = torch.zeros(case.heads, 6, device=DEVICE)
            names = ("key_cache", "value_cache", "block_table_BP", "prefix_lens_B")
            inputs = {name: value for name, value in case.inputs.items() if name not in names}
            finish_tree_attention(**inputs, out_THD=out, lse_HT=lse, impl=impl, **case.settings)
            assert torch.equal(out[3:], torch.ones_like(out[3:]))
        else:
            assert found[:3].isfinite().all()
            assert found[3:].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("page", [16, 32, 48])
def test_page_sizes(impl, page):
    case = Attention([page - 1, page, page + 1, 100], trees(2, 3, 4, 5), page=page)
    case.assert_right(run(case, impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [1, 3, 16, 200])
def test_sliding_window_counts_depth_and_not_rows(impl, window):
    chain = [-1, 0, 1, 2, 3, 4]
    case = Attention(
        [0, 3, 40, 130],
        [words(chain), words(chain), *trees(9, 6)],
        window=window,
    )
    case.assert_right(run(case, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_pages_before_the_window_are_not_read(impl):
    """vLLM frees them; another request's values, or none, may be there."""
    case = Attention([130], trees(5), window=20)
    expected = run(case, impl).clone()
    freed = case.inputs["block_table_BP"][0, : (130 - 20) // case.page].tolist()
    for cache in ("key_cache", "value_cache"):
        case.inputs[cache][freed] = float("nan")
    assert torch.equal(run(case, impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("empty", [float("-inf"), float("inf"), NAN])
def test_every_mark_of_an_empty_prefix(impl, empty):
    case = Attention([0, 12], trees(4, 4))
    case.assert_right(finish(case, impl, empty))


@pytest.mark.parametrize("impl", IMPLS)
def test_finish_goes_on_from_a_prefix_that_outweighs_the_tree(impl):
    case = Attention([40], trees(6))
    case.inputs["key_cache"].mul_(20.0)
    case.assert_right(finish(case, impl))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_THD": torch.zeros(2, 4, 32, dtype=torch.float64)}, "query_THD|float64"),
        ({"block_table_BP": torch.zeros(1, 1, dtype=torch.int64)}, "block_table_BP"),
        ({"prefix_lens_B": torch.zeros(1, dtype=torch.int64)}, "prefix_lens_B"),
        ({"ancestor_bits_T": torch.zeros(2, dtype=torch.int32)}, "ancestor_bits_T"),
        ({"max_tree_len": 65}, "max_tree_len must be between 1 and 64"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"softcap": -1.0}, "softcap"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    case = Attention([4], trees(2))
    change = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in change.items()}
    arguments = case.inputs | case.settings | {"out_THD": case.inputs["query_THD"]} | change
    with pytest.raises(ValueError, match=message):
        tree_attention(**arguments)
