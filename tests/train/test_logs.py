"""The log of a run as a reader of it finds it."""

import json
from pathlib import Path

import pytest

from vllm_eagle3.train.logs import RunLog, rounded


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_a_new_run_starts_a_new_log_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    for resume, expected in ((False, 2), (True, 4), (False, 2)):
        log = RunLog(tmp_path, resume=resume)
        log.write("start")
        log.write("step", step=1, loss=0.123456)
        assert len(lines(tmp_path)) == expected
    assert lines(tmp_path)[-1] == {"event": "step", "step": 1, "loss": 0.1235}


def test_lines_of_steps_that_are_run_again_are_dropped(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write("start")
    for step in (1, 2, 3):
        log.write("step", step=step)
    with (tmp_path / "training_log.jsonl").open("a") as file:
        file.write('{"event": "st')  # the process was killed here
    RunLog(tmp_path, resume=True).rewind(2)
    assert [entry.get("step") for entry in lines(tmp_path)] == [None, 1, 2]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    log = RunLog(tmp_path, active=False)
    log.write("step", step=1)
    log.advance(0.5, 10)
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.000123456, 0.0001235),
        (12.345678, 12.3457),
        (8e-06, 8e-06),
        ([1, {"a": 2.00001}], [1, {"a": 2.0}]),
    ],
)
def test_small_numbers_keep_their_digits(value: object, expected: object) -> None:
    assert rounded(value) == expected
