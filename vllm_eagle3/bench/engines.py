"""Engines that stay alive side by side, one process each, of which one at a time is asked."""

import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_eagle3.bench.configurations import Configuration
from vllm_eagle3.bench.jobs import WorkerError, WorkerProcess, worker_error

_MODULE = "vllm_eagle3.bench.timing"
_SHUTDOWN_SECONDS = 20
_GRAPH_WARNING = re.compile(r"CUDAGraphMode\.\w+ is not supported.*|Skipping CUDA graph capture")


class Engine:
    """One configuration's ``LLM`` in a worker of its own; a context manager.

    Attributes:
        name: of the configuration.
        ready: what the engine told about itself once it stood.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.ready: dict[str, Any] | None = None
        self._log_path = log_path
        self._left = False
        self._worker = WorkerProcess(
            {"engine": dict(settings)},
            log_path,
            module=_MODULE,
            obeys=True,
            environment=environment,
        )
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def __enter__(self) -> "Engine":
        self._worker.__enter__()
        self._reader = threading.Thread(target=self._receive, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._left:
            return
        self._left = True
        self._worker.kill()
        self._reader.join()
        self._worker.__exit__()

    def wait_ready(self, timeout: float) -> dict[str, Any]:
        """Wait until the engine stands.

        Raises:
            WorkerError: it failed or took longer than ``timeout`` seconds. So do the others.
        """
        self.ready = self._await("ready", timeout)
        text = self._log_path.read_text(encoding="utf-8", errors="replace")
        # The engine's process decides at last, and tells its log only.
        self.ready["graph_warnings"] = sorted(set(_GRAPH_WARNING.findall(text)))
        return self.ready

    def measure(
        self,
        waves: Sequence[Sequence[Mapping[str, Any]]],
        temperature: float,
        max_tokens: int,
        timeout: float,
    ) -> dict[str, Any]:
        """Answer the waves one after the other; returns the event ``measured``."""
        command = {"waves": waves, "temperature": temperature, "max_tokens": max_tokens}
        self._worker.send({"command": "measure", **command})
        return self._await("measured", timeout)

    def profile(
        self,
        prefix: str,
        waves: Sequence[Sequence[Mapping[str, Any]]],
        temperature: float,
        max_tokens: int,
        timeout: float,
    ) -> Path | None:
        """The same under the profiler; returns the trace."""
        command = {"waves": waves, "temperature": temperature, "max_tokens": max_tokens}
        self._worker.send({"command": "profile", "prefix": prefix, **command})
        trace = self._await("profiled", timeout)["trace"]
        return Path(trace) if trace else None

    def ask_to_stop(self) -> None:
        """Let the engine end in its own way; see :meth:`wait_stopped`."""
        self._worker.send({"command": "stop"})

    def wait_stopped(self) -> None:
        """Wait until the engine has ended, and its memory is free."""
        self._worker.wait(_SHUTDOWN_SECONDS)

    def _receive(self) -> None:
        for event in self._worker.events():
            self._events.put(event)
        self._events.put(None)

    def _await(self, kind: str, timeout: float) -> dict[str, Any]:
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            raise worker_error(f"took longer than {timeout:.0f} s", self._log_path) from None
        if event is None:
            raise worker_error(self._worker.wait(), self._log_path)
        assert event["event"] == kind
        return event


def start_engines(
    stack: ExitStack,
    configurations: Sequence[Configuration],
    make: Callable[[Configuration], Engine],
    timeout: float,
    failed: Callable[[str, str], None],
) -> dict[str, Engine]:
    """Start all engines at once and wait for all; those that stand, by name.

    Args:
        stack: ends the engines when it is left.
        make: the engine of a configuration, not started yet.
        timeout: seconds until the last of them must stand.
        failed: receives the name and the error of each that does not.
    """
    engines = [stack.enter_context(make(configuration)) for configuration in configurations]
    deadline = time.monotonic() + timeout

    def wait(engine: Engine) -> Engine | None:
        try:
            engine.wait_ready(max(1.0, deadline - time.monotonic()))
        except WorkerError as error:
            failed(engine.name, str(error))
            engine.__exit__()
            return None
        return engine

    with ThreadPoolExecutor(max(1, len(engines))) as pool:
        standing = list(pool.map(wait, engines))
    return {engine.name: engine for engine in standing if engine is not None}
