import pytest

from vllm_eagle3.bench.jobs import WorkerError, run_worker


def test_a_worker_that_fails_shows_its_last_lines(tmp_path):
    log = tmp_path / "worker.log"
    with pytest.raises(WorkerError, match=r"exit code 1; its last lines:(.|\n)*KeyError: 'engine'"):
        list(run_worker({}, log))
    assert "Traceback" in log.read_text()


def test_a_worker_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(WorkerError, match="took longer than"):
        list(run_worker({"engine": {}}, tmp_path / "worker.log", timeout=0.01))
