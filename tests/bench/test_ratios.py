import pytest

from tests.bench.results_of_speed import cell, run
from vllm_eagle3.bench.ratios import rate, spread, summarize


def test_a_rate_is_of_all_waves_together():
    both = run(1.0, 3.0)
    assert rate(both, "tokens_per_second") == 40 / 4
    assert rate(both, "decode_tokens_per_second") == pytest.approx(38 / 3.6)
    assert rate(run(1.0, full_steps=0), "full_tokens_per_second") == pytest.approx(18 / 0.8)


def test_a_span_of_no_time_has_no_rate():
    empty = run(1.0)
    empty["waves"][0].update(full_seconds=0.0, full_tokens=0)
    assert rate(empty, "full_tokens_per_second") is None


def test_trees_are_compared_with_the_best_chain_of_the_cell():
    repeats = [
        {"plain": 8.0, "chain-1": 6.0, "chain-3": 4.0, "tree-8": 2.0},
        {"plain": 8.0, "chain-1": 1.0, "chain-3": 4.0, "tree-8": 4.0},
        {"plain": 8.0, "chain-1": 6.0, "chain-3": 4.0, "tree-8": 3.2},
    ]
    summary = summarize(cell(1, 0.0, repeats))
    # chain-1 has the best single repeat, chain-3 the best median.
    assert summary["best_chain"] == "chain-3"
    assert list(summary["over_best_chain"]) == ["tree-8"]
    ratio = summary["over_best_chain"]["tree-8"]
    assert ratio["tokens_per_second"] == {
        "median": 1.25,
        "quartiles": [1.125, 1.625],
        "min": 1.0,
        "max": 2.0,
        "n": 3,
    }
    assert ratio["pooled"] == pytest.approx(12 / 9.2)
    assert summary["over_plain"]["chain-3"]["tokens_per_second"]["median"] == 2.0


def test_a_slow_repeat_does_not_change_a_ratio():
    repeats = [{"chain-3": 2.0, "tree-8": 1.0}, {"chain-3": 20.0, "tree-8": 10.0}]
    ratio = summarize(cell(1, 0.0, repeats))["over_best_chain"]["tree-8"]
    assert ratio["tokens_per_second"]["min"] == ratio["tokens_per_second"]["max"] == 2.0


def test_a_configuration_that_failed_halfway_counts_where_it_ran():
    repeats = [{"chain-3": 2.0, "tree-8": 1.0}, {"chain-3": 2.0}]
    summary = summarize(cell(1, 0.0, repeats))
    assert summary["over_best_chain"]["tree-8"]["tokens_per_second"]["n"] == 1
    assert summary["configurations"]["chain-3"]["tokens_per_second"]["n"] == 2


def test_without_chains_there_is_nothing_to_beat():
    summary = summarize(cell(1, 0.0, [{"plain": 2.0, "tree-8": 1.0}]))
    assert summary["best_chain"] is None
    assert summary["over_best_chain"] == {}


def test_tau_and_step_time():
    figures = summarize(cell(1, 0.0, [{"chain-3": 2.0}]))["configurations"]["chain-3"]
    assert figures["tau"] == pytest.approx(19 / 9)
    assert figures["step_ms"]["median"] == pytest.approx(1000 * 1.6 / 8)


def test_the_spread_of_one_value_and_of_none():
    assert spread([2.0])["quartiles"] == [2.0, 2.0]
    assert spread([]) is None
