"""An engine that is asked, again and again, how long it takes: reads commands, writes events.

``python -m vllm_eagle3.bench.timing JOB.json EVENT_FD`` builds one ``LLM`` and then obeys the
commands on stdin, one JSON object a line; it ends with its input.
:mod:`vllm_eagle3.bench.engines` is the other end.

Job::

    {"engine": {...}}            see vllm_eagle3.bench.llm.build_engine

Commands::

    {"command": "measure", "waves": [[{"prompt": [1, 2], "seed": 3}]],
     "temperature": 0.0, "max_tokens": 96}
    {"command": "profile", "prefix": "...", ...}    the same, under vLLM's profiler

Events, by ``"event"``::

    ready     versions, device, size of the KV cache
    measured  waves, a list of what _Clock.read returns; counters, vLLM's own
    profiled  trace, the file that the profiler wrote or null
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle3.bench.job_process import Emit, job_and_events
from vllm_eagle3.bench.llm import build_engine, describe, describe_memory, read_counters

if TYPE_CHECKING:
    from vllm import LLM

Command = dict[str, Any]

_request_ids = map(str, count())


def run(job: dict[str, Any], commands: "queue.Queue[Command]", emit: Emit) -> None:
    """Build the engine, then obey until the command ``stop``."""
    start = time.monotonic()
    llm = build_engine(job["engine"])
    seconds = round(time.monotonic() - start, 1)
    emit({"event": "ready", **describe(llm), **describe_memory(llm), "start_seconds": seconds})
    while (command := commands.get())["command"] != "stop":
        if command["command"] == "measure":
            before = read_counters(llm)
            waves = [_answer(llm, wave, command) for wave in command["waves"]]
            counters = {name: value - before[name] for name, value in read_counters(llm).items()}
            emit({"event": "measured", "waves": waves, "counters": counters})
        else:
            emit({"event": "profiled", "trace": _profile(llm, command)})


def _answer(llm: "LLM", wave: list[dict[str, Any]], command: Command) -> dict[str, Any]:
    """Submit all requests of a wave at once and wait for the last token of the last one."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    clock = _Clock(len(wave))
    for request in wave:
        sampling = SamplingParams(
            temperature=command["temperature"],
            max_tokens=command["max_tokens"],
            # Every configuration does the same work.
            ignore_eos=True,
            seed=request["seed"],
            # One output for each engine step: the step's own tokens.
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(next(_request_ids), {"prompt_token_ids": request["prompt"]}, sampling)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        clock.step(
            {o.request_id: len(o.outputs[0].token_ids) for o in outputs},
            any(o.finished for o in outputs),
        )
    return clock.read()


class _Clock:
    """Times of one wave, from the tokens that each engine step brings.

    Three spans: all of it; from the step that brings the last first token on (decoding); and
    of those the steps until the first request ends (full), where the batch is whole.
    """

    def __init__(self, num_requests: int, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._num_requests = num_requests
        self._start = now()
        self._started: set[str] = set()
        self._decoding: tuple[float, int] | None = None  # since when, tokens until then
        self._full: tuple[float, int, int] | None = None  # until when, tokens, steps
        self._any_finished = False
        self._tokens = self._steps = self._decode_steps = 0
        self._forwards = 0
        self._end = self._start

    def step(self, tokens: dict[str, int], any_finished: bool) -> None:
        """Take in one engine step: tokens by request, and whether it ended a request."""
        tokens = {request: count for request, count in tokens.items() if count}
        if not tokens:
            return
        self._end = self._now()
        self._steps += 1
        self._tokens += sum(tokens.values())
        # The first token of a request comes from its prefill, which verifies nothing.
        self._forwards += sum(request in self._started for request in tokens)
        self._started.update(tokens)
        self._any_finished |= any_finished
        if self._decoding is None:
            if len(self._started) == self._num_requests:
                self._decoding = self._end, self._tokens
            return
        self._decode_steps += 1
        if not self._any_finished:
            self._full = self._end, self._tokens, self._decode_steps

    def read(self) -> dict[str, Any]:
        """Seconds, tokens and steps of each span; forwards counts decoding requests' steps."""
        assert self._decoding is not None, "a wave ended before every request had a token"
        since, before = self._decoding
        until, tokens, steps = self._full or (since, before, 0)
        return {
            "requests": self._num_requests,
            "seconds": self._end - self._start,
            "tokens": self._tokens,
            "steps": self._steps,
            "forwards": self._forwards,
            "prefill_seconds": since - self._start,
            "decode_seconds": self._end - since,
            "decode_tokens": self._tokens - before,
            "full_seconds": until - since,
            "full_tokens": tokens - before,
            "full_steps": steps,
        }


def _profile(llm: "LLM", command: Command) -> str | None:
    """Answer the waves under the profiler that the engine was configured with."""
    llm.start_profile(command["prefix"])
    for wave in command["waves"]:
        _answer(llm, wave, command)
    llm.stop_profile()
    config = llm.llm_engine.vllm_config.profiler_config
    traces = Path(config.torch_profiler_dir).glob(f"{command['prefix']}_*.pt.trace.json*")
    return max(map(str, traces), default=None)


def _read_commands(commands: "queue.Queue[Command]") -> None:
    # Not sys.stdin: a forked engine closes that one, and would wait for this thread's lock.
    with open(os.dup(sys.stdin.fileno()), encoding="utf-8") as lines:
        for line in lines:
            commands.put(json.loads(line))
    # Whoever started this engine is gone: take it and vLLM's own processes off the GPU.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    with job_and_events() as (job, emit):
        commands: queue.Queue[Command] = queue.Queue()
        threading.Thread(target=_read_commands, args=(commands,), daemon=True).start()
        run(job, commands, emit)


if __name__ == "__main__":
    main()
