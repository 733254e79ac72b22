"""``vllm-eagle3 bench serving``: what a user of a server waits, as vLLM's own client reports it.

Starts ``vllm serve`` with each configuration and runs ``vllm bench serve`` against one server
at a time: streaming chats, a fixed number of them at once, outputs of a fixed length. Between
two chunks of a stream lies a step of the engine, which brings several tokens where drafts are
accepted: ITL is the time of such a step, TPOT the mean time of a token.

Every run asks the first chats of one list in which the data sets take turns, so that runs of
fewer chats ask part of what the others ask; vLLM's client asks some again where the list is
too short. Configurations go in rotating order within each
repeat, and figures are medians over the repeats.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

from vllm_eagle3.bench import target
from vllm_eagle3.bench.configurations import Configuration, check_plugin
from vllm_eagle3.bench.jobs import WorkerError
from vllm_eagle3.bench.llm import kv_bytes_per_token
from vllm_eagle3.bench.options import (
    MEMORY_SHARE,
    add_configurations,
    add_data,
    add_dtype,
    add_pair,
    check_positive,
    recorded,
    select,
    temperature,
)
from vllm_eagle3.bench.output import make_log_folder, write_results
from vllm_eagle3.bench.pair import check_pair
from vllm_eagle3.bench.questions import Question, load_questions
from vllm_eagle3.bench.schedule import rotation, take_turns
from vllm_eagle3.bench.servers import Server, run_client, write_dataset
from vllm_eagle3.bench.serving_report import FIGURES, render, summarize
from vllm_eagle3.options import json_object

_AT_ONCE = [1, 4, 16]
_KEPT = (
    "duration",
    "completed",
    "total_input_tokens",
    "total_output_tokens",
    *FIGURES.values(),
    "spec_decode_acceptance_length",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add_pair(parser)
    add_data(parser)
    add_configurations(parser, [3], ["63"])
    add("--no-plain", action="store_true", help="leave plain decoding out")
    add(
        "--concurrency",
        nargs="+",
        type=int,
        default=_AT_ONCE,
        help=f"chats at once ({' '.join(map(str, _AT_ONCE))})",
    )
    add("--prompts", type=int, default=10, help="chats for each one at once (%(default)s)")
    add("--min-prompts", type=int, default=30, help="and at least so many in all (%(default)s)")
    add(
        "--repeats",
        type=int,
        default=3,
        help="runs of the same chats; figures are medians (%(default)s)",
    )
    add("--max-tokens", type=int, default=128, help="tokens of every answer (%(default)s)")
    add("--temperature", type=temperature, default=0.0, help="0 is greedy (%(default)s)")
    add_dtype(parser)
    add("--max-model-len", type=int, default=1024, help="tokens of prompt and answer (%(default)s)")
    add(
        "--servers-at-once",
        type=int,
        default=4,
        help="alive side by side; one is busy (%(default)s)",
    )
    add(
        "--serve",
        type=json_object,
        default={},
        help="further options of vllm serve, JSON object (none)",
    )
    add("--compile-cache", type=Path, help="folder for each server's compiled code (vLLM's own)")
    add(
        "--start-timeout",
        type=float,
        default=400,
        help="seconds until all servers stand (%(default)s)",
    )
    add(
        "--timeout", type=float, default=300, help="seconds for one run of the client (%(default)s)"
    )
    add(
        "--output",
        "--out",
        type=Path,
        required=True,
        help="JSON file; the table goes beside it (.md)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 0 if every configuration finished, else 1.

    Raises:
        ValueError: a setting that cannot work, before any server starts.
    """
    configurations = select(args, plain=not args.no_plain)
    check_pair(args, configurations, args.max_model_len)
    check_plugin(configurations)
    check_positive(args, "servers_at_once", "prompts", "repeats", "max_tokens")
    check_positive(args, "max_model_len", "concurrency")
    folder = make_log_folder(args.output)
    chats = _mixed(load_questions(args.data))
    write_dataset([question.turns[0] for question in chats], folder / "chats.json")

    results: dict[str, Any] = {
        "kind": "serving",
        "settings": recorded(args) | {"data": [path.name for path in args.data]},
        "notes": target.notes(args.target),
        "runs": [],
        "summary": [],
        "errors": {},
    }
    for start in range(0, len(configurations), args.servers_at_once):
        _measure(args, configurations[start : start + args.servers_at_once], folder, results)
    print(render(results))
    return 1 if results["errors"] else 0


def _mixed(questions: Sequence[Question]) -> list[Question]:
    """The data sets take turns, and so do the categories within each."""
    by_category = take_turns(questions, lambda question: (question.dataset, question.category))
    return take_turns(by_category, lambda question: question.dataset)


def _measure(
    args: argparse.Namespace,
    configurations: Sequence[Configuration],
    folder: Path,
    results: dict[str, Any],
) -> None:
    """Start the servers together, and ask those that stand."""
    with ExitStack() as stack:
        servers = {
            configuration.name: stack.enter_context(
                _server(args, configuration, folder, len(configurations))
            )
            for configuration in configurations
        }
        deadline = time.monotonic() + args.start_timeout
        for name, server in list(servers.items()):
            try:
                server.wait_ready(deadline)
            except WorkerError as error:
                results["errors"][name] = str(error)
                del servers[name]
        _ask_all(args, {name: server.port for name, server in servers.items()}, folder, results)
    write_results(args.output, results, render(results))


def _ask_all(
    args: argparse.Namespace, ports: dict[str, int], folder: Path, results: dict[str, Any]
) -> None:
    """All repeats, written after each run; a server that fails is not asked again."""
    names = list(ports)
    for concurrency, repeat in product(args.concurrency, range(args.repeats)):
        for name in rotation(names, repeat):
            if name not in ports:
                continue
            path = folder / f"{name}-{concurrency}-{repeat}"
            try:
                measured = _ask(args, ports[name], concurrency, path)
            except WorkerError as error:
                results["errors"][name] = str(error)
                del ports[name]
                continue
            where = {"name": name, "concurrency": concurrency, "repeat": repeat}
            results["runs"].append(where | measured)
            results["summary"] = summarize(results["runs"])
            write_results(args.output, results, render(results))
            print(f"{name}, {concurrency} at once: {measured}", file=sys.stderr, flush=True)


def _server(
    args: argparse.Namespace, configuration: Configuration, folder: Path, at_once: int
) -> Server:
    import torch

    on_cpu = not torch.cuda.is_available()
    dtype = args.dtype or ("float32" if on_cpu else "auto")
    requests = max(args.concurrency)
    tokens = (requests + 1) * args.max_model_len
    options: dict[str, Any] = {
        "speculative_config": configuration.speculative_config(args.head),
        "dtype": dtype,
        "max_model_len": args.max_model_len,
        "max_num_seqs": requests,
        "max_num_batched_tokens": max(8192, requests * 64) if not on_cpu else 512,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": round(MEMORY_SHARE / at_once, 3),
        "kv_cache_memory_bytes": tokens
        * kv_bytes_per_token({"model": args.target, "dtype": dtype}),
    }
    if on_cpu:
        options["enforce_eager"] = True
    environment = {}
    if args.compile_cache:
        environment["VLLM_CACHE_ROOT"] = str(args.compile_cache.resolve() / configuration.name)
    log_path = folder / f"{configuration.name}.log"
    return Server(args.target, options | args.serve, log_path, environment, on_cpu)


def _ask(args: argparse.Namespace, port: int, concurrency: int, path: Path) -> dict[str, Any]:
    options = {
        "dataset_name": "sharegpt",
        "dataset_path": path.parent / "chats.json",
        "sharegpt_output_len": args.max_tokens,
        "ignore_eos": True,
        "temperature": args.temperature,
        "num_prompts": max(args.min_prompts, args.prompts * concurrency),
        "max_concurrency": concurrency,
        "num_warmups": 2 * concurrency,
        "disable_shuffle": True,
        "percentile_metrics": "ttft,tpot,itl",
        "metric_percentiles": "50,99",
    }
    # Not with_suffix: the names of configurations may hold dots.
    result_path = path.with_name(f"{path.name}.json")
    result = run_client(args.target, port, options, result_path, args.timeout)
    return {key: result[key] for key in _KEPT if key in result}
