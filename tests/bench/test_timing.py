import json
import signal
import subprocess
import sys

import pytest

from vllm_eagle3.bench.timing import _Clock


def clock(num_requests, *steps):
    """A wave whose steps end one second apart; each is (tokens, whether one finished)."""
    times = iter(range(100))
    ticking = _Clock(num_requests, lambda: float(next(times)))
    for tokens, finished in steps:
        ticking.step(tokens, finished)
    return ticking.read()


def test_one_request():
    read = clock(1, ({"0": 1}, False), ({"0": 3}, False), ({"0": 2}, False), ({"0": 1}, True))
    assert (read["seconds"], read["tokens"], read["steps"], read["forwards"]) == (4, 7, 4, 3)
    assert (read["prefill_seconds"], read["decode_seconds"], read["decode_tokens"]) == (1, 3, 6)
    # The last step was cut at max_tokens.
    assert (read["full_seconds"], read["full_tokens"], read["full_steps"]) == (2, 5, 2)


def test_decoding_begins_with_the_last_first_token():
    read = clock(
        2,
        ({"0": 1}, False),
        ({"0": 2, "1": 1}, False),
        ({"0": 2, "1": 3}, False),
        ({"0": 1, "1": 2}, True),
        ({"1": 2}, True),
    )
    assert (read["prefill_seconds"], read["decode_seconds"]) == (2, 3)
    assert (read["decode_tokens"], read["forwards"]) == (10, 6)
    assert (read["full_seconds"], read["full_tokens"], read["full_steps"]) == (1, 5, 1)


def test_a_step_without_tokens_is_none():
    read = clock(1, ({"0": 1}, False), ({"0": 0}, False), ({}, False), ({"0": 1}, True))
    assert (read["steps"], read["seconds"]) == (2, 2)
    assert read["full_steps"] == 0


def test_a_request_without_a_token_is_a_defect():
    with pytest.raises(AssertionError, match="before every request had a token"):
        clock(2, ({"0": 1}, True))


def test_a_worker_does_not_outlive_who_started_it(tmp_path):
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"engine": {"model": "never loaded"}}))
    # Its input ends at once, long before there is an engine.
    command = [sys.executable, "-m", "vllm_eagle3.bench.timing", str(job), "2"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, start_new_session=True, capture_output=True, timeout=30
    )
    assert done.returncode == -signal.SIGKILL
