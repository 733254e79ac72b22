"""``vllm-eagle3 bench memory``: how much KV cache a configuration leaves in the same GPU memory.

Starts each configuration alone, one after the other, with the same ``gpu_memory_utilization``,
and reads the number of KV blocks that vLLM finds room for. Ratios are over the first chain; where
none is asked for, over plain decoding, or the first tree if that is left out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.bench import target
from vllm_eagle3.bench.configurations import Configuration, check_plugin
from vllm_eagle3.bench.engines import Engine
from vllm_eagle3.bench.jobs import WorkerError
from vllm_eagle3.bench.markdown import failure, table
from vllm_eagle3.bench.options import (
    add_configurations,
    add_engine_args,
    add_pair,
    check_positive,
    select,
)
from vllm_eagle3.bench.output import make_log_folder, write_results
from vllm_eagle3.bench.pair import check_pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add_pair(parser)
    add_configurations(parser, [3], ["63"])
    add(
        "--gpu-memory-utilization", type=float, default=0.9, help="share of the GPU's (%(default)s)"
    )
    add("--max-num-seqs", type=int, default=64, help="requests in a batch (%(default)s)")
    add("--max-num-batched-tokens", type=int, default=8192, help="of a step (%(default)s)")
    add("--max-model-len", type=int, default=2048, help="tokens of prompt and answer (%(default)s)")
    add("--no-plain", action="store_true", help="leave plain decoding out")
    add_engine_args(parser)
    add(
        "--timeout",
        type=float,
        default=400,
        help="seconds for the start of one engine (%(default)s)",
    )
    add(
        "--output",
        "--out",
        type=Path,
        required=True,
        help="JSON file; the table goes beside it (.md)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 0 if every configuration started, else 1.

    Raises:
        ValueError: a setting that cannot work, before any engine starts.
    """
    configurations = select(args, plain=not args.no_plain)
    check_positive(args, "max_num_seqs", "max_num_batched_tokens", "max_model_len")
    check_pair(args, configurations, args.max_model_len)
    check_plugin(configurations)
    folder = make_log_folder(args.output)
    settings = {
        "model": args.target,
        "dtype": None,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_model_len": args.max_model_len,
        "measure_kv_cache": True,
        **args.engine,
    }
    results: dict[str, Any] = {
        "kind": "memory",
        "settings": settings,
        "notes": target.notes(args.target),
        "reference": _reference([configuration.name for configuration in configurations]),
        "engines": {},
        "errors": {},
    }
    for configuration in configurations:
        try:
            results["engines"][configuration.name] = _start(args, configuration, settings, folder)
        except WorkerError as error:
            results["errors"][configuration.name] = str(error)
            print(f"{configuration.name} failed: {error}", file=sys.stderr, flush=True)
        # One at a time may take minutes: keep what there is.
        write_results(args.output, results, render(results))
    print(render(results))
    return 1 if results["errors"] else 0


def _reference(names: Sequence[str]) -> str:
    """The configuration that the others compare with: the first chain, else the first of all."""
    return next((name for name in names if name.startswith("chain")), names[0])


def _start(
    args: argparse.Namespace, configuration: Configuration, settings: dict[str, Any], folder: Path
) -> dict[str, Any]:
    speculative = {"speculative_config": configuration.speculative_config(args.head)}
    log_path = folder / f"{configuration.name}.log"
    with Engine(configuration.name, settings | speculative, log_path) as engine:
        ready = engine.wait_ready(args.timeout)
        # In its own way, so that its memory is free for the next.
        engine.ask_to_stop()
        engine.wait_stopped()
    return {key: value for key, value in ready.items() if key != "event"}


def render(results: dict[str, Any]) -> str:
    """One table, and every error; no ratios where the reference failed."""
    engines, reference = results["engines"], results["reference"]
    settings = results["settings"]
    device = next((engine["device"] for engine in engines.values()), None)
    base = engines[reference]["kv_cache_tokens"] if reference in engines else None
    rows = [
        [
            f"`{name}`",
            str(engine["num_gpu_blocks"]),
            str(engine["kv_cache_tokens"]),
            f"{engine['kv_cache_tokens'] / base:.4f}" if base else "-",
        ]
        for name, engine in engines.items()
    ]
    parts = [
        f"KV cache at gpu_memory_utilization={settings['gpu_memory_utilization']:g},"
        f" max_num_seqs={settings['max_num_seqs']},"
        f" max_num_batched_tokens={settings['max_num_batched_tokens']}"
        + (f" on {device}." if device else "."),
        *results["notes"],
        table(["configuration", "blocks", "tokens", f"tokens / `{reference}`"], rows),
    ]
    parts += [failure(*item) for item in results["errors"].items()]
    return "\n\n".join(parts) + "\n"
