"""``vllm-eagle3 bench acceptance``: tau of chains and of draft trees with one head.

Answers the questions of each data set with every configuration (see
:mod:`vllm_eagle3.bench.answering`) and counts tokens for each target forward, as
:mod:`vllm_eagle3.bench.tau` defines it. Unless told otherwise, plain decoding runs too, and every
output is compared with its.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.bench import answering, report, target
from vllm_eagle3.bench.configurations import PLAIN, Configuration, check_plugin
from vllm_eagle3.bench.options import add_configurations, add_data, add_pair, recorded, select
from vllm_eagle3.bench.output import make_log_folder, write_results
from vllm_eagle3.bench.pair import check_pair
from vllm_eagle3.bench.questions import load_questions
from vllm_eagle3.bench.results import Run, summarize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add_pair(parser)
    add_data(parser)
    add_configurations(parser, [3, 5, 7], ["8", "16", "32", "60"], one_size=True)
    add("--no-plain", action="store_true", help="no plain decoding, so no check of identity")
    answering.add_arguments(parser)
    add(
        "--output",
        "--out",
        type=Path,
        required=True,
        help="JSON file; the tables go beside it (.md)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 0 if every configuration finished, else 1.

    Raises:
        ValueError: a setting that cannot work, before any engine starts.
    """
    answering.check_arguments(args)
    configurations = select(args, plain=not args.no_plain)
    check_pair(args, configurations, args.max_model_len)
    check_plugin(configurations)
    questions = load_questions(args.data, args.limit)
    log_dir = make_log_folder(args.output)
    runs = answering.answer(args, configurations, questions, log_dir)
    results = merge(args, configurations, runs, [question.dataset for question in questions])
    tables = report.render(results)
    print(tables)
    write_results(args.output, results, tables)
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
