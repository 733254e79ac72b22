"""``vllm serve`` processes, and vLLM's own client against them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.bench.jobs import WorkerError, worker_error

_VLLM = "vllm.entrypoints.cli.main"
# Arguments of Python that run vLLM's client.
CLIENT = ["-m", _VLLM, "bench", "serve"]
_INTERPRETER = "vllm_eagle3.engine.interpreter"
_SHUTDOWN_SECONDS = 30
_POLL_SECONDS = 0.5


class Server:
    """An OpenAI-compatible server of vLLM on a free port of this machine; a context manager.

    Args:
        model: the target.
        options: of ``vllm serve``, without the leading dashes; None leaves one out, true and
            false make a switch, and a dictionary becomes JSON.
        log_path: receives what the server prints.
        environment: variables beside those of this process.
        on_cpu: serve through Triton's interpreter.
    """

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        on_cpu: bool = False,
    ) -> None:
        self.port = _free_port()
        self._log_path = log_path
        module = _INTERPRETER if on_cpu else _VLLM
        self._command = [sys.executable, "-m", module, "serve", model]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port), *to_flags(options)]
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> "Server":
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_eagle3.bench.leash", *self._command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        return self

    def wait_ready(self, deadline: float) -> None:
        """Wait until the server answers.

        Raises:
            WorkerError: it ended, or does not answer at ``deadline`` (of the monotonic clock).
        """
        while self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(_POLL_SECONDS)
            if time.monotonic() > deadline:
                raise worker_error("took too long to start", self._log_path)
        raise worker_error(f"ended with exit code {self._process.returncode}", self._log_path)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(_SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run_client(
    model: str,
    port: int,
    options: Mapping[str, Any],
    result_path: Path,
    timeout: float,
) -> dict[str, Any]:
    """``vllm bench serve`` against a chat server on ``port``; returns what it saved.

    Raises:
        WorkerError: it failed, or took longer than ``timeout`` seconds.
    """
    command = [sys.executable, *CLIENT, "--model", model]
    command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-tqdm", "--save-result"]
    command += ["--result-dir", str(result_path.parent), "--result-filename", result_path.name]
    command += to_flags(options)
    log_path = result_path.with_suffix(".log")
    with log_path.open("wb") as log:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise worker_error(f"took longer than {timeout:.0f} s", log_path) from None
    if done.returncode or not result_path.exists():
        raise worker_error(f"ended with exit code {done.returncode}", log_path)
    result = json.loads(result_path.read_text(encoding="utf-8"))
    if result.get("failed"):
        raise WorkerError(f"{result['failed']} requests failed; see {log_path.name}")
    return result


def write_dataset(prompts: Sequence[str], path: Path) -> None:
    """Write prompts for the client, in the one format of which it needs no further package."""
    conversations = [
        {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": ""}]}
        for prompt in prompts
    ]
    path.write_text(json.dumps(conversations), encoding="utf-8")


def to_flags(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line has them."""
    flags: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, Mapping):
            flags += [flag, json.dumps(value)]
        else:
            flags += [flag, str(value)]
    return flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
