import pytest

from tests.bench.results_of_speed import cell, results
from vllm_eagle3.bench.speed_report import least_step_ms, render

REPEATS = [
    {"plain": 4.0, "chain-3": 2.0, "tree-8": 1.0},
    {"plain": 4.0, "chain-3": 2.0, "tree-8": 1.6},
]


def test_rows_are_configurations_and_columns_batch_sizes():
    text = render(results(cell(4, 0.0, REPEATS), cell(1, 0.0, REPEATS[:1])))
    assert (
        "### T=0: tokens/s while every request of the batch decodes\n\n"
        "| batch | 1 | 4 |\n"
        "| --- | --: | --: |\n"
        "| `plain` | 6 | 6 |\n"
        "| `chain-3` | 11 | 11 |\n"
        "| `tree-8` | 22 | 18 |\n"
    ) in text
    assert (
        "from the prompts to the last answer's end\n\n"
        "| batch | 1 | 4 |\n"
        "| --- | --: | --: |\n"
        "| `plain` | 5 | 5 |\n"
    ) in text
    assert "| best chain | `chain-3` | `chain-3` |\n| `tree-8` | 2.000 [2.00, 2.00] |" in text
    assert "1.625 [1.25, 2.00]" in text


def test_each_temperature_has_tables_of_its_own():
    text = render(results(cell(1, 0.0, REPEATS), cell(1, 1.0, REPEATS)))
    assert text.index("### T=0: mean acceptance") < text.index("### T=1: tokens/s")


def test_anchors_show_the_figures_of_their_first_round():
    later = [{"plain": 2.0, "chain-3": 2.0, "tree-16": 1.0}]
    text = render(results(cell(1, 0.0, REPEATS), cell(1, 0.0, later, round_number=1)))
    assert "| `plain` | 6 |" in text
    assert "| `tree-16` | 22 |" in text


def test_a_step_stands_beside_the_least_possible():
    measured = results(cell(1, 0.0, REPEATS))
    # 8.6 GB of target at 4.3 TB/s, and five times a head of 0.86 GB.
    assert least_step_ms(measured, "plain", 1) == pytest.approx(2.0)
    assert least_step_ms(measured, "tree-8", 1) == pytest.approx(3.0)
    assert "[3.00]" in render(measured)
    measured["step_cost"] = None
    assert "[3.00]" not in render(measured)


def test_notes_profiles_and_failures():
    ms = {"target": 5, "sampling": 0.1, "draft": 1, "tree": 0.2, "other": 0.1, "idle": 0.1}
    profile = {"name": "tree-8", "batch_size": 1, "temperature": 0.0, "step_ms": 6.5, "ms": ms}
    measured = results(cell(1, 0.0, REPEATS), profiles=[profile], notes=["Widened."])
    measured["configurations"][1]["error"] = "out of memory"
    text = render(measured)
    assert "\n\nWidened.\n\n" in text
    assert (
        "| `tree-8` | 1 | 130.000 | 6.500 | 5.000 | 0.100 | 1.000 | 0.200 | 0.100 | 0.100 | 0.500 |"
        in text
    )
    assert "`chain-3` failed:\n\n```\nout of memory\n```" in text
