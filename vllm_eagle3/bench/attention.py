"""``vllm-eagle3 bench attention``: attention to trees beside FlashAttention 3 on chains.

One layer's attention, as it runs inside a CUDA graph. A cell's sides replay in turn, repeat by
repeat in rotating order; a replay holds many calls, each on other pages of a cache larger than
L2, since a model's other weights empty L2 between its layers. Figures are medians of
microseconds for one call; ratios are taken within a repeat.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_eagle3.bench.attention_report import render
from vllm_eagle3.bench.attention_sides import CAUSAL, MAX_SPLITS, SIDES, Cell, Inputs, Model, Pool
from vllm_eagle3.bench.output import write_results
from vllm_eagle3.bench.schedule import rotation

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_QUICK = {"context": [512, 8192], "batch": [1, 16], "nodes": [8, 32], "repeats": 10}
_MAX_CALLS = 96
# Of the largest output: sides that part by more than rounding do not measure the same thing.
_TOLERANCE = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--context", nargs="+", type=int, default=[512, 2048, 8192, 32768], help="cached tokens")
    add("--batch", nargs="+", type=int, default=[1, 4, 16, 64], help="requests")
    add("--nodes", nargs="+", type=int, default=[8, 16, 32, 64], help="nodes of a tree, root too")
    add("--draft", type=int, default=8, help="rows of a draft's level; 0 leaves drafting out")
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=128)
    add("--page", type=int, default=16, help="tokens of a page of the cache")
    add("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    add("--sides", nargs="+", choices=sorted(SIDES), help="default: all that this GPU has")
    add("--repeats", type=int, default=12)
    add("--quick", action="store_true", help="eight small cells, to see that all works")
    add("--time-budget", type=float, default=90, help="seconds after which no cell is begun")
    add("--bandwidth", type=float, default=4.3, help="TB/s, of the time to read the cache once")
    add("--output", "--out", type=Path, required=True, help="JSON file; the tables go beside it")


def run(args: argparse.Namespace) -> int:
    """Measure and write; 0 if the sides agree in every cell, else 1.

    Raises:
        ValueError: no CUDA GPU, or a setting that cannot work.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench attention measures a CUDA GPU, and there is none here")
    if args.quick:
        vars(args).update(_QUICK)
    model, cells = _model(args), plan(args.context, args.batch, args.nodes, args.draft)
    names = args.sides or available_sides()
    timer = CudaTimer()
    results = measure(
        model,
        cells,
        names,
        timer,
        repeats=args.repeats,
        cold_bytes=3 * timer.properties.L2_cache_size,
        memory=int(0.85 * torch.cuda.mem_get_info()[0]),
        deadline=time.monotonic() + args.time_budget,
        device=torch.device("cuda"),
    )
    results["device"] = timer.properties.name
    results["versions"] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    results["bandwidth"] = args.bandwidth
    text = render(results)
    print(text)
    write_results(args.output, results, text)
    return 0 if all(cell.get("agree", True) for cell in results["cells"]) else 1


def _model(args: argparse.Namespace) -> Model:
    if args.heads % args.kv_heads:
        raise ValueError(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}")
    if args.page % 16 or not 16 <= args.head_dim <= 256:
        raise ValueError("--page must be a multiple of 16, --head-dim between 16 and 256")
    return Model(args.heads, args.kv_heads, args.head_dim, args.page, _DTYPES[args.dtype])


def plan(
    contexts: Sequence[int], batches: Sequence[int], nodes: Sequence[int], draft: int
) -> list[Cell]:
    """All cells, the verification first.

    Raises:
        ValueError: a size that no tree or batch has.
    """
    if min(contexts) < 1 or min(batches) < 1:
        raise ValueError("--context and --batch must be positive")
    if not all(1 <= count <= 64 for count in nodes) or not 0 <= draft <= 12:
        raise ValueError("--nodes must be between 1 and 64, --draft between 0 and 12")
    grid = [(context, batch) for context in contexts for batch in batches]
    cells = [Cell(context, batch, count) for context, batch in grid for count in nodes]
    if draft:
        cells += [Cell(context, batch, draft, draft=True) for context, batch in grid]
    return cells


def available_sides() -> list[str]:
    """All sides where FlashAttention 3 runs, else our kernels alone."""
    if torch.cuda.get_device_capability()[0] == 9:
        return list(SIDES)
    print("FlashAttention 3 needs a Hopper GPU: only our own kernels", file=sys.stderr)
    return ["portable"]


class Timer(Protocol):
    """Prepares a sequence of calls once, and times it again and again."""

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> Any: ...

    def microseconds(self, prepared: Any) -> float: ...


class CudaTimer:
    """CUDA graphs between events."""

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
        """Capture the calls, after one of them has compiled and warmed what they need."""
        calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        return graph

    def microseconds(self, prepared: torch.cuda.CUDAGraph) -> float:
        """Of one replay; the GPU sleeps first, so that it never waits for the launch."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(400_000)
        start.record()
        prepared.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3


def measure(
    model: Model,
    cells: Sequence[Cell],
    names: Sequence[str],
    timer: Timer,
    *,
    repeats: int,
    cold_bytes: int,
    memory: int,
    deadline: float,
    device: torch.device,
) -> dict[str, Any]:
    """Measure all cells that fit; the others are named with the reason.

    Args:
        names: of :data:`vllm_eagle3.bench.attention_sides.SIDES`.
        cold_bytes: of cache that the calls of one replay read before they repeat.
        memory: bytes that a cell may take.
        deadline: of ``time.monotonic()``, after which no cell is begun.
    """
    start = time.monotonic()
    fitting = [cell for cell in cells if _bytes(model, cell) <= memory]
    tokens = [cell.batch * (cell.context + cell.rows + model.page) for cell in fitting]
    pool = Pool(model, max([-(-cold_bytes // model.token_bytes), *tokens]), device)
    entries = []
    for cell in cells:
        entry: dict[str, Any] = dict(vars(cell))
        entries.append(entry)
        if cell not in fitting:
            entry["skipped"] = f"{_bytes(model, cell) / 1e9:.0f} GB do not fit"
        elif time.monotonic() > deadline:
            entry["skipped"] = "no time left"
        else:
            entry |= _measure_cell(model, cell, names, pool, timer, repeats, cold_bytes)
            print(_progress(entry), file=sys.stderr, flush=True)
    settings = {**vars(model), "dtype": str(model.dtype).removeprefix("torch.")}
    return {
        "model": settings,
        "sides": list(names),
        "repeats": repeats,
        "cells": entries,
        "seconds": round(time.monotonic() - start, 1),
    }


def _bytes(model: Model, cell: Cell) -> int:
    """The cache, and FlashAttention's partial outputs of float32."""
    rows = cell.batch * cell.rows
    cache = cell.batch * (cell.context + cell.rows + model.page) * model.token_bytes
    return cache + 4 * MAX_SPLITS * rows * model.heads * (model.head_dim + 1)


def _measure_cell(
    model: Model,
    cell: Cell,
    names: Sequence[str],
    pool: Pool,
    timer: Timer,
    repeats: int,
    cold_bytes: int,
) -> dict[str, Any]:
    read_bytes = cell.batch * cell.context * model.token_bytes
    calls = min(max(2, -(-cold_bytes // read_bytes)), _MAX_CALLS)
    inputs = Inputs(model, cell, pool, calls)
    sides = {name: SIDES[name](inputs) for name in names}
    outputs = [side(inputs.tables[0]).clone() for name, side in sides.items() if name != CAUSAL]
    difference = max((_difference(out, outputs[0]) for out in outputs), default=0.0)
    prepared = {
        name: timer.prepare([lambda t=table, side=side: side(t) for table in inputs.tables])
        for name, side in sides.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in rotation(names, repeat):
            samples[name].append(timer.microseconds(prepared[name]) / calls)
    return {
        "calls": calls,
        "read_bytes": read_bytes,
        "microseconds": {name: statistics.median(samples[name]) for name in names},
        "samples": {name: [round(value, 3) for value in samples[name]] for name in names},
        "ratio": {
            name: statistics.median(
                own / rival for own, rival in zip(samples[name], samples[CAUSAL], strict=True)
            )
            for name in names
            if CAUSAL in samples and name != CAUSAL
        },
        "difference": difference,
        # A NaN agrees with nothing.
        "agree": difference <= _TOLERANCE,
    }


def _difference(out: torch.Tensor, other: torch.Tensor) -> float:
    return float((out - other).abs().max() / other.abs().max())


def _progress(entry: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {value:.1f}" for name, value in entry["microseconds"].items())
    kind = "draft rows" if entry["draft"] else "nodes"
    warning = "" if entry["agree"] else "  THE SIDES DISAGREE"
    return (
        f"context {entry['context']}, batch {entry['batch']}, {entry['rows']} {kind}: {times} us"
        + warning
    )
