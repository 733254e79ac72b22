"""``vllm-eagle3 bench acceptance``: tau of chains and of draft trees with one head.

Answers the questions of each data set with every configuration (each in a process of its
own) and counts tokens for each target forward, as :mod:`vllm_eagle3.bench.tau` defines it.
Conversations of several turns are answered turn by turn, each with the run's own earlier
answers before it. Every turn has a fixed sampling seed, the same in all configurations. Unless
told otherwise, plain decoding runs too, and every output is compared with its.
"""

import argparse
import json
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_eagle3.bench import report, target
from vllm_eagle3.bench.configurations import PLAIN, Configuration, chain, check_plugin, tree
from vllm_eagle3.bench.jobs import WorkerError, run_worker
from vllm_eagle3.bench.options import (
    MEMORY_SHARE,
    add_pair,
    check_names,
    check_positive,
    recorded,
)
from vllm_eagle3.bench.questions import DEFAULT_DATA, Question, load_questions
from vllm_eagle3.bench.results import Run, summarize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add_pair(parser)
    add(
        "--data",
        nargs="+",
        type=Path,
        default=DEFAULT_DATA,
        help='JSON lines with "turns", or folders of them (default: MT-bench, HumanEval and'
        " GSM8K, 80 questions each, which come with the package)",
    )
    add("--limit", type=int, help="only the first so many questions of each set")
    add("--chain", nargs="*", type=int, default=[3, 5, 7], help="drafts of vLLM's chains")
    add("--tree", nargs="*", type=int, default=[8, 16, 32, 60], help="drafts of the trees")
    add("--depth", type=int, help="depth of the trees (default: the plugin's)")
    add("--top-k", type=int, help="children for each node (default: the plugin's)")
    add("--no-plain", action="store_true", help="no plain decoding, so no check of identity")
    add("--temperature", nargs="+", type=float, default=[0.0, 1.0])
    add("--max-tokens", type=int, default=512, help="longest answer of a turn")
    add("--seed", type=int, default=0)
    add("--dtype", help="vLLM's dtype (default: the model's; float32 without a GPU)")
    add("--max-model-len", type=int, default=2048)
    add("--max-num-seqs", type=int, default=64, help="requests in a batch")
    add("--enforce-eager", action="store_true", help="start sooner, without CUDA graphs")
    add("--jobs", type=int, default=1, help="configurations at once, sharing the GPU's memory")
    add("--timeout", type=float, help="seconds after which a configuration counts as failed")
    add("--output", type=Path, required=True, help="JSON file; the tables go beside it (.md)")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 0 if every configuration finished, else 1.

    Raises:
        ValueError: a setting that cannot work, before any engine starts.
    """
    configurations = _configurations(args)
    check_plugin(configurations)
    questions = load_questions(args.data, args.limit)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    log_dir = args.output.with_suffix(".logs")
    log_dir.mkdir(exist_ok=True)

    progress = _Progress(len(args.temperature) * sum(len(q.turns) for q in questions))

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
    runs = [run_of[configuration.name] for configuration in configurations]

    results = merge(args, configurations, runs, [question.dataset for question in questions])
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tables = report.render(results)
    args.output.with_suffix(".md").write_text(tables, encoding="utf-8")
    print(tables)
    return 1 if any(result.error for result in runs) else 0


def merge(
    args: argparse.Namespace,
    configurations: Sequence[Configuration],
    runs: Sequence[Run],
    datasets: Sequence[str],
) -> dict[str, Any]:
    """All figures of the benchmark, as they are written to ``--output``."""
    cells = [(dataset, t) for dataset in dict.fromkeys(datasets) for t in args.temperature]
    reference = runs[configurations.index(PLAIN)] if PLAIN in configurations else None
    return {
        "settings": recorded(args) | {"data": [str(path) for path in args.data]},
        "notes": target.notes(args.target),
        "cells": [{"dataset": dataset, "temperature": t} for dataset, t in cells],
        "configurations": [
            {
                "name": configuration.name,
                "num_speculative_tokens": configuration.num_speculative_tokens,
                "tree": configuration.tree,
                "shape": configuration.shape,
                **summarize(result, reference, cells),
            }
            for configuration, result in zip(configurations, runs, strict=True)
        ],
    }


def _configurations(args: argparse.Namespace) -> list[Configuration]:
    check_positive(args, "jobs", "max_tokens", "max_num_seqs")
    configurations = [] if args.no_plain else [PLAIN]
    configurations += [chain(count) for count in args.chain]
    configurations += [tree(count, args.depth, args.top_k) for count in args.tree]
    check_names(configurations)
    return configurations


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


class _Progress:
    """One line for each tenth of a configuration's turns, from all threads."""

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
