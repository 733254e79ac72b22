"""Replicas at work: each in a process of its own, or a single one in this process."""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.engine.replica import Replica
from vllm_eagle3.engine.replica_gpus import Placement, place, seeing, visible_gpus

_GRACE = 60  # seconds for a replica to stop after the time limit or an interruption

MakeReplica = Callable[[], Replica]  # picklable; called in the replica's own process


class Progress:
    """A bar that reads the replicas' status files; tokens a second beside it."""

    def __init__(self, out_dir: Path, label: str, key: str, total: int, initial: int = 0) -> None:
        """
        Args:
            key: of the status, what the bar counts.
            initial: what earlier runs did, where the status does not count it.
        """
        from tqdm import tqdm

        self._out_dir, self._key, self._initial = out_dir, key, initial
        before = self._sum(key) + initial
        self._tokens_before, self._started = self._sum("tokens"), 0.0
        unit = "tok" if key == "tokens" else key
        self._bar = tqdm(total=total, initial=before, unit=unit, unit_scale=True, desc=label)

    def update(self) -> None:
        """Show what the replicas report by now."""
        tokens = self._sum("tokens") - self._tokens_before
        if tokens and not self._started:
            self._started = time.time()  # the engines' start is not part of the rate
            self._tokens_before += tokens
        elif tokens and self._key != "tokens":
            rate = tokens / max(time.time() - self._started, 1)
            self._bar.set_postfix_str(f"{rate:,.0f} tok/s", refresh=False)
        self._bar.update(self._sum(self._key) + self._initial - self._bar.n)

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()

    def _sum(self, key: str) -> int:
        return sum(status.get(key, 0) for status in statuses(self._out_dir))


def statuses(out_dir: Path) -> list[dict[str, Any]]:
    """What the replicas wrote last, in their order."""
    return [json.loads(path.read_text()) for path in sorted(out_dir.glob("replica-*.json"))]


def run_replicas(
    makers: Sequence[MakeReplica],
    progress: Progress,
    deadline: float | None,
    gpus_each: int = 1,
) -> list[int]:
    """Run all replicas to their ends; returns the indices of those that failed.

    Several are spread over the visible GPUs; a single one has them all.

    An interruption (SIGINT or SIGTERM) lets every replica write what it has finished, then
    goes on to the caller as KeyboardInterrupt.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if len(makers) == 1:
            replica = makers[0]()
            replica.on_report = progress.update
            replica.run()
            return []
        placements = place(len(makers), visible_gpus(), gpus_each)
        return _run_processes(makers, placements, progress, deadline)
    except KeyboardInterrupt:
        print(
            "interrupted: what was finished is kept, the same command goes on from it",
            file=sys.stderr,
        )
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        progress.close()


def _run_processes(
    makers: Sequence[MakeReplica],
    placements: Sequence[Placement],
    progress: Progress,
    deadline: float | None,
) -> list[int]:
    # spawn: a forked child could not start CUDA once anything here has touched it.
    context = multiprocessing.get_context("spawn")
    workers = []
    for index, (make, placement) in enumerate(zip(makers, placements, strict=True)):
        workers.append(context.Process(target=_work, args=(index, make, placement.sharing)))
        # In the environment it starts with: vLLM and torch may read it when they are imported.
        with seeing(placement.gpus):
            workers[-1].start()
    try:
        while any(worker.is_alive() for worker in workers):
            time.sleep(1)
            progress.update()
            if deadline is not None and time.time() > deadline + _GRACE:
                _stop(workers)
    except BaseException:
        _stop(workers)
        raise
    progress.update()
    return [index for index, worker in enumerate(workers) if worker.exitcode != 0]


def _stop(workers: list[Any]) -> None:
    """Ask, then kill: shards are written whole or not at all."""
    for worker in workers:
        worker.terminate()
    end = time.time() + _GRACE
    for worker in workers:
        worker.join(max(0.0, end - time.time()))
        worker.kill()
        worker.join()


def _work(index: int, make: MakeReplica, sharing: int) -> None:
    """A replica in a process of its own, ended at once when its shards are written.

    Interpreter shutdown waits for the engine's threads and children, which can take longer
    than the work.
    """
    import psutil

    def interrupt(*_: Any) -> None:
        # Once: a second signal must not interrupt the writing that the first one asks for.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    code = 1
    try:
        replica = make()
        replica.sharing = sharing
        replica.run()
        code = 0
    except ValueError as error:
        print(f"replica {index}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    sys.stderr.flush()
    os._exit(code)


def raise_failed(failed: list[int]) -> None:
    """Report replicas that failed.

    Raises:
        RuntimeError: there are some.
    """
    if failed:
        raise RuntimeError(
            f"replicas {failed} failed (their messages are above); what was written is kept: "
            "fix the cause and run the same command again"
        )
