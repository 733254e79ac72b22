"""Runs engine workers as child processes and survives their failures.

An engine gives its memory back reliably only when its process ends, so every configuration
gets a process of its own.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LOG_TAIL_LINES = 15
_SHUTDOWN_SECONDS = 20


class WorkerError(RuntimeError):
    """A worker ended before its job did; the message says how and ends with its log."""


def run_worker(
    job: dict[str, Any], log_path: Path, timeout: float | None = None
) -> Iterator[dict[str, Any]]:
    """Run one job of :mod:`vllm_eagle3.bench.worker` and yield its events.

    Args:
        job: see the worker's module docstring.
        log_path: receives what the worker and vLLM print.
        timeout: seconds after which the worker is killed.

    Raises:
        WorkerError: the worker failed, was killed, or ended without its last event.
    """
    with WorkerProcess(job, log_path, timeout) as worker:
        for event in worker.events():
            yield event
            if event["event"] == "done":
                # vLLM may stumble while it shuts down; the job is complete by now.
                worker.wait(_SHUTDOWN_SECONDS)
                return
        failure = worker.wait()
    raise worker_error(failure, log_path)


def worker_error(failure: str, log_path: Path) -> WorkerError:
    """An error that says how the worker ended, with the last lines of its log."""
    return WorkerError(f"the engine's process {failure}; its last lines:\n{_tail(log_path)}")


class WorkerProcess:
    """A worker process, its group, and the pipes of its events and commands.

    Args:
        job: what the worker reads from its first argument, a JSON file.
        log_path: receives what the worker and vLLM print.
        timeout: seconds after which the worker is killed.
        module: the worker's module, called as ``python -m MODULE JOB.json EVENT_FD``.
        obeys: whether it reads commands from stdin, one JSON object a line. Such a worker
            ends at the end of its input, so it never outlives this process.
        environment: variables of the worker beside those of this process.
    """

    def __init__(
        self,
        job: dict[str, Any],
        log_path: Path,
        timeout: float | None = None,
        *,
        module: str = "vllm_eagle3.bench.worker",
        obeys: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._job = job
        self._log_path = log_path
        self._timeout = timeout
        self._module = module
        self._obeys = obeys
        self._environment = environment or {}
        self._failure = ""

    def __enter__(self) -> "WorkerProcess":
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(self._job, file)
        self._job_path = Path(file.name)
        read_fd, write_fd = os.pipe()
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, file.name, str(write_fd)],
                stdin=subprocess.PIPE if self._obeys else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(write_fd,),
                # The worker asks whether there is a GPU and may fork its engine afterwards:
                # asked through CUDA instead of NVML, the engine could not use the GPU.
                env={**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", **self._environment},
                start_new_session=True,
            )
        os.close(write_fd)
        self._pipe = os.fdopen(read_fd, encoding="utf-8")
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def send(self, command: dict[str, Any]) -> None:
        """Write one command; a worker that is gone is noticed where its events end."""
        assert self._process.stdin is not None, "this worker takes no commands"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        for line in self._pipe:
            # A worker that dies may leave half a line.
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)

    def wait(self, timeout: float | None = None) -> str:
        """Wait for the end of the process and say how it came."""
        self._watcher.join(timeout)
        return self._failure

    def _watch(self) -> None:
        try:
            self._failure = f"ended with exit code {self._process.wait(self._timeout)}"
        except subprocess.TimeoutExpired:
            self._failure = f"took longer than {self._timeout:.0f} s"
        # The engine may live in children of the worker, which hold the pipe open.
        self.kill()

    def kill(self) -> None:
        """End the worker and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._watcher.join()
        self._pipe.close()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._job_path.unlink()


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:])
