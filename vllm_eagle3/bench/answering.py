"""Answers questions with every configuration, each in an engine and a process of its own.

Conversations of several turns are answered turn by turn, each with the run's own earlier
answers before it. Every turn has a fixed sampling seed, the same in all configurations.
"""

import argparse
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_eagle3.bench.configurations import PLAIN, Configuration
from vllm_eagle3.bench.jobs import WorkerError, run_worker
from vllm_eagle3.bench.options import MEMORY_SHARE, add_dtype, add_temperatures, check_positive
from vllm_eagle3.bench.questions import Question
from vllm_eagle3.bench.results import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which questions are answered how."""
    add = parser.add_argument
    add("--limit", type=int, help="only the first so many questions of each set (all)")
    add_temperatures(parser)
    add("--max-tokens", type=int, default=512, help="tokens of the longest answer (%(default)s)")
    add("--seed", type=int, default=0, help="of the engines and of every turn (%(default)s)")
    add_dtype(parser)
    add("--max-model-len", type=int, default=2048, help="tokens of prompt and answer (%(default)s)")
    add("--max-num-seqs", type=int, default=64, help="requests in a batch (%(default)s)")
    add("--enforce-eager", action="store_true", help="start sooner, without CUDA graphs")
    add("--jobs", type=int, default=1, help="configurations at once on the GPU (%(default)s)")
    add("--timeout", type=float, help="seconds a configuration may take (no limit)")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ``ValueError`` for an option of :func:`add_arguments` that cannot work."""
    check_positive(args, "jobs", "limit", "max_tokens", "max_num_seqs", "max_model_len")


def answer(
    args: argparse.Namespace,
    configurations: Sequence[Configuration],
    questions: Sequence[Question],
    log_dir: Path,
) -> list[Run]:
    """The run of each configuration; one that failed says so and leaves the others.

    Args:
        args: of :func:`add_arguments`, ``target`` and ``head``.
        log_dir: receives what the engines print.
    """
    progress = Progress(len(args.temperature) * sum(len(q.turns) for q in questions))

    def measure(configuration: Configuration) -> Run:
        job = _job(args, configuration, questions)
        result = Run()
        progress.show(configuration.name, "loading")
        try:
            log_path = log_dir / f"{configuration.name}.log"
            for event in run_worker(job, log_path, args.timeout):
                result.receive(event)
                progress.advance(configuration.name, len(result.turns) + len(result.skipped))
            progress.show(configuration.name, "finished")
        except WorkerError as error:
            result.error = str(error)
            progress.show(configuration.name, f"failed: {error}")
        return result

    # The largest first, which take longest: the last job then ends sooner.
    order = sorted(configurations, key=lambda c: c.num_speculative_tokens or 0, reverse=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        measured = pool.map(measure, order)
        run_of = {
            configuration.name: run for configuration, run in zip(order, measured, strict=True)
        }
    return [run_of[configuration.name] for configuration in configurations]


def _job(
    args: argparse.Namespace, configuration: Configuration, questions: Sequence[Question]
) -> dict[str, Any]:
    rows = 1 + (configuration.num_speculative_tokens or 0)
    engine = {
        "model": args.target,
        "speculative_config": configuration.speculative_config(args.head),
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        # Room for every request's tree beside a prompt: the scheduler trims drafts otherwise.
        "max_num_batched_tokens": args.max_num_seqs * rows + args.max_model_len,
        "enforce_eager": args.enforce_eager,
        "gpu_memory_utilization": round(MEMORY_SHARE / args.jobs, 3),
        "seed": args.seed,
    }
    return {
        "engine": engine,
        "passes": [
            {
                "temperature": temperature,
                "max_tokens": args.max_tokens,
                # Where half precision parts two greedy outputs, this tells how near a tie it was.
                "runner_up": configuration == PLAIN and temperature == 0,
                "conversations": [
                    {
                        "dataset": question.dataset,
                        "number": question.number,
                        "turns": list(question.turns),
                        "seeds": [question.seed(args.seed, t) for t in range(len(question.turns))],
                    }
                    for question in questions
                ],
            }
            for temperature in args.temperature
        ],
    }


class Progress:
    """One line on stderr for each tenth of a configuration's turns, from all threads."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._tenths: dict[str, int] = {}
        self._lock = threading.Lock()

    def advance(self, name: str, turns: int) -> None:
        tenth = 10 * turns // self._total
        if tenth > self._tenths.get(name, 0):
            self._tenths[name] = tenth
            self.show(name, f"{turns}/{self._total} turns")

    def show(self, name: str, text: str) -> None:
        with self._lock:
            print(f"{name:>10}  {text}", file=sys.stderr, flush=True)
