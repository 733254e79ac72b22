from vllm_eagle3.bench.report import label, render


def entry(name, drafts, tree=None, cells=(), error=None, skipped=()):
    return {
        "name": name,
        "num_speculative_tokens": drafts,
        "tree": tree,
        "shape": {"depth": 6, "top_k": 8} if tree else None,
        "error": error,
        "skipped": list(skipped),
        "cells": list(cells),
        "passes": [],
    }


def cell(dataset, temperature, tau, identity=None):
    figures = {"dataset": dataset, "temperature": temperature, "tau": tau}
    return figures | ({"identity": identity} if identity else {})


def results(*entries):
    cells = [{"dataset": d, "temperature": t} for d in ("mt_bench", "mine") for t in (0.0, 1.0)]
    return {"notes": [], "cells": cells, "configurations": list(entries)}


def test_rows_are_configurations_and_columns_sets_and_temperatures():
    taus = {("mt_bench", 0.0): 2.0, ("mt_bench", 1.0): 1.5, ("mine", 0.0): 3.456, ("mine", 1.0): 1}
    cells = [cell(*key, tau) for key, tau in taus.items()]
    text = render(
        results(
            entry("plain", None, cells=cells),
            entry("chain-5", 5, cells=cells),
            entry("tree-32", 32, tree=True, cells=cells),
        )
    )
    assert (
        "| configuration | MT-bench, T=0 | MT-bench, T=1 | mine, T=0 | mine, T=1 |\n"
        "| --- | --: | --: | --: | --: |\n"
        "| chain, 5 drafts | 2.00 | 1.50 | 3.46 | 1.00 |\n"
        "| tree, 32 drafts (depth 6, top-k 8) | 2.00 | 1.50 | 3.46 | 1.00 |\n"
    ) in text
    assert "plain decoding" not in text


def test_identity_and_the_nearness_of_ties():
    divergences = [{"number": 0, "turn": 0, "index": 4, "gap": 0.0625, "runner_up": True}]
    identity = {"compared": 80, "identical": 79, "divergences": divergences}
    sampled = {"compared": 80, "identical": 2, "divergences": [{"gap": 5.0}]}
    cells = [cell("mine", 0.0, 2.0, identity), cell("mine", 1.0, 2.0, sampled)]
    text = render(results(entry("plain", None), entry("chain-5", 5, cells=cells)))
    assert "| chain, 5 drafts | failed | failed | 79/80 | 2/80 |" in text
    assert "differ by 0.0625 at most" in text


def test_a_failure_shows_in_the_table_and_in_full_below():
    broken = entry("tree-8", 8, tree=True, cells=[cell("mt_bench", 0.0, None)], error="no memory")
    text = render(results(broken))
    assert "| tree, 8 drafts (depth 6, top-k 8) | - | failed | failed | failed |" in text
    assert "`tree-8` failed:\n\n```\nno memory\n```" in text


def test_vllms_own_figure_stands_beside_tau():
    checked = entry("chain-3", 3)
    checked["passes"] = [
        {"tau": 2.0, "vllm_tau": 2.25},
        {"tau": 1.5, "vllm_tau": 1.5},
        {"tau": None, "vllm_tau": None},
    ]
    assert "minus tau: 0.000 to 0.250." in render(results(checked))


def test_skipped_turns_are_told():
    assert "`chain-3` skipped 2 turns" in render(results(entry("chain-3", 3, skipped=[{}, {}])))


def test_a_static_tree_is_called_one():
    entry = {"num_speculative_tokens": 25, "tree": {}, "shape": {"paths": [[0]]}}
    assert label(entry) == "static tree, 25 drafts"


def test_a_tree_of_one_size_is_called_so():
    static = {"paths": [[0]], "verify_budget": None}
    assert label(entry("t", 25, True) | {"shape": static}) == "static tree, 25 drafts (fixed size)"
    fixed, served = (
        label(entry("t", 8, True) | {"shape": {"depth": 4, "top_k": 2, "verify_budget": budget}})
        for budget in (None, 128)
    )
    assert fixed == "tree, 8 drafts (depth 4, top-k 2, fixed size)"
    assert served == "tree, 8 drafts (depth 4, top-k 2)"
