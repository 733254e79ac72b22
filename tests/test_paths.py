import pytest

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.paths import PUBLISHED, read_paths

FORK = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 1, 0]]


def test_eagle_1s_tree_has_25_nodes():
    paths = read_paths("mc_sim_7b_63")
    depths = [len(path) for path in paths]
    assert [depths.count(depth) for depth in range(1, 6)] == [4, 8, 8, 3, 2]
    assert read_paths([list(path) for path in paths]) == paths  # it keeps its own rules


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_is_a_config(name):
    config = TreeConfig.from_dict({"paths": name})
    assert (config.num_speculative_tokens, config.depth, config.top_k) == (25, 5, 4)
    assert config.verify_budget == 128
    assert TreeConfig.from_dict(config.to_dict(), 25) == config


def test_depth_and_width_follow_from_the_paths():
    config = TreeConfig.from_dict({"paths": FORK, "verify_budget": None}, 6)
    assert (config.depth, config.top_k, config.verify_budget) == (3, 2, None)
    # Three nodes of a level have children, none has more than two.
    wide = TreeConfig.from_dict({"paths": [[0], [1], [0, 0], [0, 1], [1, 0], *deeper()]})
    assert (wide.depth, wide.top_k) == (3, 3)
    assert TreeConfig.from_dict({"paths": [[0]]}).top_k == 1


def deeper() -> list[list[int]]:
    return [[0, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_fewer_nodes_are_the_first_paths():
    config = TreeConfig.from_dict({"paths": [[0], [0, 0], [0, 0, 0], [1], [1, 0]]})
    tiers = [config.tier(count) for count in range(1, 6)]
    assert [tier.paths for tier in tiers] == [config.paths[:count] for count in range(1, 6)]
    assert [(tier.depth, tier.top_k) for tier in tiers] == [(1, 1), (2, 1), (3, 1), (3, 2), (3, 2)]


@pytest.mark.parametrize(
    ("tree", "count", "message"),
    [
        ({"paths": "mc_sim_13b"}, 25, r"'mc_sim_13b' is no known tree: use 'mc_sim_7b_63', or"),
        ({"paths": "mc_sim_7b_63"}, 63, "=63 but tree.paths has 25 nodes: use num_speculative_tok"),
        ({"paths": FORK}, 5, "num_speculative_tokens=5 but tree.paths has 6 nodes"),
        ({"paths": FORK, "depth": 3}, 6, "tree has paths, .* and 'depth': leave out one"),
        ({"paths": FORK, "top_k": 3, "depth": 3}, 6, "'depth', 'top_k': leave out one"),
        ({"paths": []}, None, "must be the name of a tree, or a list of paths"),
        ({"paths": None}, None, "must be the name of a tree, or a list of paths"),
        ({"paths": [0, 1]}, None, "must be the name of a tree, or a list of paths"),
        ({"paths": [[]]}, None, "must be the name of a tree, or a list of paths"),
        ({"paths": [[0], [True]]}, None, "must be the name of a tree, or a list of paths"),
        ({"paths": [[0], [-1]]}, None, "must be the name of a tree, or a list of paths"),
        ({"paths": ["0"]}, None, "must be the name of a tree, or a list of paths"),
        ({"paths": [[0], [1], [0]]}, None, r"tree.paths has \[0\] twice: remove one"),
        ({"paths": [[0, 0], [0]]}, None, r"\[0, 0\] without \[0\] before it: list a node after"),
        ({"paths": [[1], [0]]}, None, r"\[1\] without \[0\] before it"),
        ({"paths": [[0], [0, 1]]}, None, r"\[0, 1\] without \[0, 0\] before it"),
        ({"paths": [[rank] for rank in range(64)]}, None, "at most 63"),
        ({"paths": FORK, "verify_budget": 6}, None, "tree.verify_budget=6 is less than one tree"),
        ({"paths": "mc_sim_7b_63", "verify_budget": 0}, None, "tree.verify_budget must be"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(tree, count, message):
    with pytest.raises(ValueError, match=message):
        TreeConfig.from_dict(tree, count)


def test_more_than_the_drafts_mask_holds():
    chain = [[0] * length for length in range(1, 12)]
    with pytest.raises(
        ValueError, match=r"tree\.paths of depth 11, 7 wide, .* leave out the widest"
    ):
        TreeConfig.from_dict({"paths": [*chain, *([rank] for rank in range(1, 7))]})


def test_more_children_than_the_draft_has_tokens():
    config = TreeConfig.from_dict({"paths": [[0], [1], [2]]})
    config.check_draft_vocabulary(3)
    with pytest.raises(ValueError, match=r"the width 3 of tree\.paths .* leave out the widest"):
        config.check_draft_vocabulary(2)
