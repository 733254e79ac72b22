"""Training prompts that repeat an evaluation set are found, others are left alone."""

import json
from pathlib import Path

import pytest

from vllm_eagle3.data.duplicates import EXACT, NEAR, EvaluationSets, bundled_sets

LONG = (
    "A farmer has 12 cows and 7 goats. He sells half of the cows at the market and buys"
    " three more goats. How many animals does the farmer have now?"
)
SETS = EvaluationSets([LONG, "What is the capital of Atlantis today?", "Tell me a joke."])


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (LONG.upper().replace(" ", "\n"), EXACT),
        ("Solve this. " + LONG + " Think step by step.", NEAR),
        (LONG.replace("farmer", "woman").replace("market", "fair"), NEAR),
        ("Please: what is the capital of Atlantis today, and why?", NEAR),
        ("tell me a joke", EXACT),
        ("Tell me a joke. It should be about cows.", None),
        ("A farmer has 12 cows. How many animals does the farmer have now?", None),
        ("What is the capital of France today?", None),
        ("", None),
    ],
)
def test_what_counts_as_a_repetition(text: str, finding: str | None) -> None:
    assert SETS.repeated_by(text) == finding


def test_any_turn_counts() -> None:
    assert SETS.any_repeated_by(["Hello", "Tell me a joke!"]) == EXACT
    assert SETS.any_repeated_by(["Hello"]) is None


def test_every_bundled_question_and_those_of_given_files_are_known(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": "Who am I, really?"}) + "\n")
    sets = EvaluationSets.from_files([path])
    assert sets.repeated_by("Who am I really") == EXACT
    assert len(bundled_sets()) == 3
    for file in bundled_sets():
        for line in file.read_text().splitlines():
            assert all(sets.repeated_by(turn) == EXACT for turn in json.loads(line)["turns"])


def test_a_damaged_evaluation_set_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "Who?"}\n{"question"\n')
    with pytest.raises(ValueError, match=r"damaged: .*line 2"):
        EvaluationSets.from_files([path])
