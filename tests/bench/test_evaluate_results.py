"""From events to figures, tables and plots."""

import argparse

import pytest

from tests.bench.served import end_of_pass, predicted, run_of, turn
from vllm_eagle3.bench import evaluate_plots, evaluate_report
from vllm_eagle3.bench.configurations import chain
from vllm_eagle3.bench.evaluate_results import merge, tasks
from vllm_eagle3.bench.prediction import Prediction
from vllm_eagle3.bench.questions import DEFAULT_DATA, Question, load_questions
from vllm_eagle3.bench.results import Run

QUESTIONS = [
    Question("mine", 0, ("a",), "coding"),
    Question("mine", 1, ("b",), "writing"),
    Question("other", 0, ("c",)),
]
ANSWERS = (turn(0, [1, 3, 3]), turn(1, [1, 1, 1, 2]), turn(0, [1, 2, 2], dataset="other"))


def results(run: Run, prediction: Prediction) -> dict:
    args = argparse.Namespace(target="target", head="head", data=[], max_tokens=9)
    return merge(args, [chain(3)], [run], prediction, QUESTIONS)


def test_the_packaged_sets_are_ten_tasks_and_more():
    found = tasks(load_questions(DEFAULT_DATA))
    assert found[0] == ("mt_bench", None)
    assert len([category for dataset, category in found if category and dataset == "mt_bench"]) == 8
    assert found[9:] == [("humaneval", None), ("gsm8k", None), (None, None)]


def test_every_task_has_its_own_rounds():
    run = run_of(*ANSWERS, end_of_pass())
    (entry,) = results(run, predicted("chain-3", run, 3))["configurations"]
    taus = {(t["dataset"], t["category"]): t["served"]["tau"] for t in entry["tasks"]}
    assert taus == {
        ("mine", None): 2.0,
        ("mine", "coding"): 3.0,
        ("mine", "writing"): pytest.approx(4 / 3),
        ("other", None): 2.0,
        (None, None): 2.0,
    }
    assert [t["answers"] for t in entry["tasks"]] == [2, 1, 1, 1, 3]
    assert all(t["predicted"]["tau"] == pytest.approx(t["served"]["tau"]) for t in entry["tasks"])
    (context,) = entry["contexts"]
    assert (context["first"], context["last"], context["served"]["rounds"]) == (0, 127, 7)


def test_a_pass_that_did_not_end_gives_no_figures():
    run = run_of(*ANSWERS, end_of_pass(0.0), turn(0, [1, 1], temperature=1.0))
    run.error = "killed"
    found = results(run, Prediction(error="also killed"))
    (entry,) = found["configurations"]
    assert {t["temperature"] for t in entry["tasks"]} == {0.0}
    text = evaluate_report.render(found)
    assert "`chain-3` failed" in text
    assert "`prediction` failed" in text
    assert "also killed" in text
    assert "| mine | 2.00 | - | - |" in text


def test_the_tables_flag_what_is_off():
    run = run_of(*ANSWERS, end_of_pass())
    text = evaluate_report.render(results(run, predicted("chain-3", run, 3, likelihood=0.5)))
    assert "| mine | 2.00 | 1.50 ± 0.30 | **-25.0 %** |" in text
    assert "| - coding | 3.00 | 2.00 ± 0.71 | **-33.3 %** |" in text
    assert "| chain, 3 drafts, T=0, served | 71.4 | 28.6 | 0.0 |" in text
    assert "| chain, 3 drafts, T=0, predicted | 35.7 | 14.3 | 0.0 |" in text
    assert "| 0 to 127 | 2.00 (1.50) |" in text
    assert "by more than 5 % in 5 of 5 places" in text
    assert "at most 0.0 % off" in text


def test_plots_of_depth_task_and_context(tmp_path):
    pytest.importorskip("matplotlib")
    run = run_of(*ANSWERS, end_of_pass())
    found = results(run, predicted("chain-3", run, 3))
    paths = evaluate_plots.write(found, tmp_path / "head.json")
    assert [path.name for path in paths] == ["head-depth.png", "head-task.png", "head-context.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    assert evaluate_plots.write(found | {"configurations": []}, tmp_path / "none.json") == []
