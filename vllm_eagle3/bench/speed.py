"""``vllm-eagle3 bench speed``: plain decoding, vLLM's chains and draft trees, side by side.

All engines live at once on one GPU, each in a process of its own, and only one is busy at a
time. For each batch size and temperature every configuration answers the same prompts, repeat
by repeat in rotating order, with outputs of a fixed length (equal work). Figures are medians
over the repeats, of decoding while the whole batch decodes; ratios are taken within a repeat.
See :mod:`vllm_eagle3.bench.ratios`.
"""

import argparse
import sys
from pathlib import Path

from vllm_eagle3.bench.comparison import Comparison, Settings
from vllm_eagle3.bench.configurations import check_plugin
from vllm_eagle3.bench.options import (
    add_configurations,
    add_data,
    add_dtype,
    add_engine_args,
    add_pair,
    add_temperatures,
    check_positive,
    select,
)
from vllm_eagle3.bench.output import make_log_folder
from vllm_eagle3.bench.pair import check_context, check_pair
from vllm_eagle3.bench.questions import load_questions
from vllm_eagle3.bench.schedule import Cell, make_prompts
from vllm_eagle3.bench.speed_results import SpeedResults
from vllm_eagle3.data.target import load_tokenizer

_BATCHES = [1, 2, 4, 8, 16, 32, 64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add_pair(parser)
    add_data(parser)
    add_configurations(parser, [1, 3, 5, 7], ["31", "63"])
    add("--no-plain", action="store_true", help="leave plain decoding out")
    add(
        "--batch",
        nargs="+",
        type=int,
        default=_BATCHES,
        help=f"batch sizes ({' '.join(map(str, _BATCHES))})",
    )
    add_temperatures(parser)
    add("--repeats", type=int, default=10, help="measurements of each configuration (%(default)s)")
    add("--max-tokens", type=int, default=96, help="tokens of every output (%(default)s)")
    add("--prompts-per-repeat", type=int, default=3, help="at least, in full batches (%(default)s)")
    add(
        "--max-prompt", type=int, default=256, help="tokens; longer ones are left out (%(default)s)"
    )
    add("--seed", type=int, default=0, help="of sampling (%(default)s)")
    add_dtype(parser)
    add(
        "--engines-at-once",
        type=int,
        default=6,
        help="more go in rounds, with anchors (%(default)s)",
    )
    add("--max-num-batched-tokens", type=int, default=8192, help="of a step (%(default)s)")
    add("--enforce-eager", action="store_true", help="without CUDA graphs: no fair comparison")
    add_engine_args(parser)
    add(
        "--profile",
        nargs="*",
        type=int,
        default=[],
        help="batch sizes of which steps are split (none)",
    )
    add("--profile-steps", type=int, default=30, help="steps of a profile (%(default)s)")
    add("--keep-traces", action="store_true", help="leave the profiler's traces beside the logs")
    add("--compile-cache", type=Path, help="folder for each engine's compiled code (vLLM's own)")
    add(
        "--start-timeout",
        type=float,
        default=400,
        help="seconds until all engines stand (%(default)s)",
    )
    add("--timeout", type=float, default=180, help="seconds for one measurement (%(default)s)")
    add("--time-budget", type=float, help="seconds after which no repeat is begun (no limit)")
    add(
        "--output",
        "--out",
        type=Path,
        required=True,
        help="JSON file; tables and plots go beside it",
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 0 if every configuration finished, else 1.

    Raises:
        ValueError: a setting that cannot work, before any engine starts.
    """
    configurations = select(args, plain=not args.no_plain)
    _check(args)
    check_pair(args, configurations)
    check_plugin(configurations)
    questions = load_questions(args.data)
    prompts = make_prompts(load_tokenizer(args.target), questions, args.max_prompt, args.seed)
    settings = Settings.from_arguments(args, prompts, configurations)
    check_context(args.target, settings.engine["max_model_len"], "--max-prompt or --max-tokens")
    make_log_folder(args.output)
    results = SpeedResults.create(args, configurations, prompts)
    comparison = Comparison(settings, configurations, prompts, results)
    comparison.run([Cell(batch, t) for batch in args.batch for t in args.temperature])
    results.write_plots()
    print(results.render())
    return 1 if results.errors else 0


def _check(args: argparse.Namespace) -> None:
    check_positive(args, "batch", "profile", "profile_steps", "max_num_batched_tokens")
    check_positive(args, "repeats", "engines_at_once", "prompts_per_repeat")
    if max(args.profile, default=0) > max(args.batch):
        raise ValueError(f"--profile: at most the largest batch, {max(args.batch)}")
    if args.max_tokens < 2:
        raise ValueError("--max-tokens must be at least 2: the first token decodes nothing")
    if args.enforce_eager:
        print("vllm-eagle3: without CUDA graphs nothing here is a fair speed", file=sys.stderr)
