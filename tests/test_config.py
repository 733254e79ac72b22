import itertools

import pytest

from vllm_eagle3.config import TreeConfig


def test_sizes_follow_from_nodes_depth_and_top_k():
    config = TreeConfig.from_dict({"depth": 6, "top_k": 8}, num_speculative_tokens=32)
    assert config == TreeConfig(32, depth=6, top_k=8)
    assert config.num_nodes == 33
    assert config.num_candidates == 8 + 5 * 64
    assert config.num_expanded == 40


def test_the_limits_themselves_are_allowed():
    assert TreeConfig(63, depth=9, top_k=8).num_expanded == 64
    assert TreeConfig(12, depth=2, top_k=3).num_candidates == 12
    assert TreeConfig(1, depth=1, top_k=1).num_nodes == 2


@pytest.mark.parametrize("num_speculative_tokens", range(1, 64))
def test_true_makes_a_valid_tree_of_any_size(num_speculative_tokens):
    config = TreeConfig.from_dict(True, num_speculative_tokens)
    assert config.num_speculative_tokens == num_speculative_tokens
    assert config.depth <= num_speculative_tokens


def test_a_missing_key_takes_the_default():
    default = TreeConfig.from_dict(True, 32)
    assert TreeConfig.from_dict({}, 32) == default
    assert TreeConfig.from_dict({"top_k": default.top_k}, 32) == default
    assert TreeConfig.from_dict({"depth": 3}, 32) == TreeConfig(32, 3, default.top_k)
    assert TreeConfig.from_dict(True) == TreeConfig.from_dict(True, 63)


@pytest.mark.parametrize("verify_budget", [21, 64, None])
def test_goes_through_a_dict_and_back(verify_budget):
    config = TreeConfig(20, depth=4, top_k=5, verify_budget=verify_budget)
    assert TreeConfig.from_dict(config.to_dict(), 20) == config


@pytest.mark.parametrize("num_drafts", [1, 3, 4, 7, 12, 31, 32, 60, 63])
@pytest.mark.parametrize("verify_budget", [64, 128, 500])
def test_trees_of_all_requests_together_keep_the_budget(num_drafts, verify_budget):
    tiers = TreeConfig(num_drafts, 8, 8, verify_budget=verify_budget).tiers()
    assert tiers[0][0] == 1
    assert tiers[0][2] == num_drafts
    for first, last, drafts in tiers[:-2]:
        assert first <= last
        assert last * (drafts + 1) <= verify_budget
    for (_, last, drafts), (first, _, fewer) in itertools.pairwise(tiers):
        assert first == last + 1
        assert fewer < drafts
        # One request more would not have fitted, and a tree twice the next one's would not.
        assert first * (drafts + 1) > verify_budget
        assert first * 2 * (fewer + 1) > verify_budget or 2 * (fewer + 1) > num_drafts
    # One draft each is the least, until the requests are a crowd.
    assert tiers[-2][1:] == (2 * verify_budget, 1)
    assert tiers[-1][1] > 10_000
    assert tiers[-1][2] == 0


def test_without_a_budget_all_trees_are_of_one_size():
    assert len(TreeConfig(31, verify_budget=None).tiers()) == 1


def test_smaller_trees_are_not_grown_to_full_depth():
    config = TreeConfig(31, depth=6, top_k=8)
    assert [config.tier(n).depth for n in (31, 40, 15, 7, 3, 2, 1)] == [6, 6, 5, 4, 3, 2, 1]
    assert TreeConfig(31, depth=3, top_k=8).tier(15).depth == 3


@pytest.mark.parametrize(("depth", "top_k"), [(9, 8), (5, 16), (63, 1), (33, 2)])
def test_smaller_trees_have_room_for_their_nodes_and_no_wider_frontier(depth, top_k):
    config = TreeConfig(63, depth, top_k)
    for num_drafts in range(1, 63):
        tier = config.tier(num_drafts)
        assert tier.num_speculative_tokens == num_drafts <= tier.num_candidates
        assert tier.depth <= depth
        assert tier.top_k == min(top_k, num_drafts)


@pytest.mark.parametrize("depth", range(1, 66))
def test_top_k_follows_a_depth_that_is_given(depth):
    config = TreeConfig.from_dict({"depth": depth}, 1)
    assert config.depth == depth
    assert TreeConfig.from_dict({"depth": min(depth, 5)}, 16).top_k == 16


@pytest.mark.parametrize("top_k", range(1, 65))
def test_depth_follows_a_top_k_that_is_given(top_k):
    assert TreeConfig.from_dict({"top_k": top_k}, 63).top_k == top_k


@pytest.mark.parametrize(
    ("tree", "num_speculative_tokens", "setting", "remedy"),
    [
        ({"depth": 0}, 8, "tree.depth", "at least 1"),
        ({"depth": -2}, 8, "tree.depth", "at least 1"),
        ({"depth": "6"}, 8, "tree.depth", "integer"),
        ({"depth": True}, 8, "tree.depth", "integer"),
        ({"depth": 2.0}, 8, "tree.depth", "integer"),
        ({"depth": None}, 8, "tree.depth", "integer"),
        ({"top_k": 0}, 8, "tree.top_k", "at least 1"),
        ({"top_k": False}, 8, "tree.top_k", "integer"),
        ({}, 0, "num_speculative_tokens", "at least 1"),
        ({}, "8", "num_speculative_tokens", "integer"),
        (True, 0, "num_speculative_tokens", "at least 1"),
        ({}, 64, "num_speculative_tokens=64", "at most 63"),
        ({"depth": 2, "top_k": 3}, 13, "num_speculative_tokens=13", r"12 nodes\): lower it, or"),
        ({"depth": 1, "top_k": 8}, 9, "depth=1 and top_k=8", "raise tree.depth or tree.top_k"),
        ({"depth": 9, "top_k": 9}, 8, "tree.depth=9 and tree.top_k=9", "lower tree.depth or"),
        ({"depth": 66, "top_k": 1}, 8, "tree.depth=66", "more than 64: lower tree.depth"),
        ({"width": 4}, 8, "unknown key 'width' in tree", "use depth, top_k, verify_budget"),
        ({"Depth": 4, "num_nodes": 3}, 8, "'Depth', 'num_nodes'", "num_speculative_tokens"),
        ({4: 4, "b": 3}, 8, "4", "use depth, top_k, verify_budget"),
        ({"verify_budget": 20}, 31, "verify_budget=20", "raise it to 32, or lower num_spec"),
        ({"verify_budget": 0}, 8, "tree.verify_budget", "at least 1"),
        ({"verify_budget": "no"}, 8, "tree.verify_budget", "integer"),
        (False, 8, "tree must be true or an object", "leave the key out"),
        (None, 8, "tree must be true or an object", "leave the key out"),
        ("6x8", 8, "tree must be true or an object", "leave the key out"),
        ([6, 8], 8, "tree must be true or an object", "leave the key out"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(tree, num_speculative_tokens, setting, remedy):
    with pytest.raises(ValueError, match=setting) as error:
        TreeConfig.from_dict(tree, num_speculative_tokens)
    error.match(remedy)


def test_more_children_than_the_draft_has_tokens():
    config = TreeConfig(8, depth=2, top_k=8)
    config.check_draft_vocabulary(8)
    with pytest.raises(ValueError, match=r"tree\.top_k=8 .* lower tree\.top_k"):
        config.check_draft_vocabulary(7)


def test_cannot_be_changed_after_validation():
    with pytest.raises(AttributeError):
        TreeConfig(8).depth = 0
