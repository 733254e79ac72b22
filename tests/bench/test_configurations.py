from importlib.metadata import EntryPoint

import pytest

from vllm_eagle3.bench import configurations
from vllm_eagle3.bench.configurations import PLAIN, chain, check_plugin, parse_tree, tree


def test_what_each_way_asks_of_vllm():
    assert PLAIN.speculative_config("head") is None
    asked = {"method": "eagle3", "model": "head", "num_speculative_tokens": 5}
    assert chain(5).speculative_config("head") == asked
    shape = {"depth": 4, "top_k": 6, "verify_budget": None}
    assert tree(5, 4, 6).speculative_config("head") == asked | {"tree": shape}
    assert tree(5).shape == {"depth": 5, "top_k": 5, "verify_budget": None}
    assert tree(5, depth=4).shape == {"depth": 4, "top_k": 5, "verify_budget": None}


def test_names_are_unique():
    assert [c.name for c in (PLAIN, chain(3), tree(3))] == ["plain", "chain-3", "tree-3"]


def test_an_impossible_tree_is_refused_before_any_engine_starts():
    with pytest.raises(ValueError, match="more than a tree of depth=2 and top_k=2"):
        tree(60, 2, 2)


def test_a_tree_needs_the_installed_entry_point(monkeypatch):
    found = []
    monkeypatch.setattr(configurations, "entry_points", lambda group: found)
    check_plugin([PLAIN, chain(3)])
    with pytest.raises(ValueError, match="pip install"):
        check_plugin([PLAIN, tree(8)])
    value = "vllm_eagle3.engine.plugin:register"
    found.append(EntryPoint("any_name", value, "vllm.general_plugins"))
    check_plugin([PLAIN, tree(8)])


def test_trees_as_the_command_line_names_them():
    default, shaped = parse_tree("31"), parse_tree("31/5/4")
    assert (default.name, shaped.name) == ("tree-31", "tree-31-5-4")
    assert default.shape == {"depth": 5, "top_k": 16, "verify_budget": 128}
    assert shaped.shape == {"depth": 5, "top_k": 4, "verify_budget": 128}
    assert parse_tree("31/5/4", one_size=True).shape["verify_budget"] is None
    assert parse_tree("31", one_size=True).name == "tree-31"
    for text in ("31/5", "a", "31/5/4/1", "31/-5/4"):
        with pytest.raises(ValueError, match="as in 31"):
            parse_tree(text)


def test_static_trees_by_name_and_from_a_file(tmp_path):
    published = parse_tree("mc_sim_7b_63", one_size=True)
    assert (published.name, published.num_speculative_tokens) == ("tree-mc_sim_7b_63", 25)
    asked = published.speculative_config("head")["tree"]
    assert asked == {"paths": "mc_sim_7b_63", "verify_budget": None}
    assert (published.as_tree.depth, published.as_tree.verify_budget) == (5, None)
    (tmp_path / "mine.json").write_text("[[0], [1], [0, 0]]")
    mine = parse_tree(str(tmp_path / "mine.json"))
    assert (mine.name, mine.num_speculative_tokens) == ("tree-mine", 3)
    assert mine.as_tree.paths == ((0,), (1,), (0, 0))
    (tmp_path / "mine.json").write_text("[[0, 0]]")
    with pytest.raises(ValueError, match=r"without \[0\] before it"):
        parse_tree(str(tmp_path / "mine.json"))
    with pytest.raises(ValueError, match="no JSON list of paths"):
        parse_tree("none.json")


def test_forwards_of_the_draft():
    fixed, shrinking = tree(31, 4, 8), parse_tree("31/6/8")
    assert [c.draft_forwards(64) for c in (PLAIN, chain(5), fixed)] == [0, 5, 4]
    assert [shrinking.draft_forwards(batch) for batch in (1, 4, 8, 16, 32, 64)] == [
        6,
        6,
        5,
        4,
        3,
        1,
    ]
