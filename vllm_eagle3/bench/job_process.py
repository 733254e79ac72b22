"""The inside of a process that a benchmark starts: its job, and where its events go.

:class:`vllm_eagle3.bench.jobs.WorkerProcess` is the other end.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Emit = Callable[[dict[str, Any]], None]


@contextmanager
def job_and_events() -> Iterator[tuple[dict[str, Any], Emit]]:
    """The job of ``python -m MODULE JOB.json EVENT_FD``, and what writes its events.

    An event is one JSON object a line; vLLM's own output keeps stdout and stderr.
    """
    job_path, event_fd = sys.argv[1:]
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    with os.fdopen(int(event_fd), "w", encoding="utf-8", buffering=1) as events:
        yield job, lambda event: print(json.dumps(event), file=events, flush=True)
