"""``vllm-eagle3 bench train``: how fast heads are trained, in how much memory.

Each side trains an EAGLE-3 head from the same weights on the same documents, in a process of
its own. Tokens are the assistant's, which the loss is about: padding does not count, and neither
do prompts. Times are of whole optimiser steps, reading of data included.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from operator import truediv
from pathlib import Path
from typing import Any

from vllm_eagle3.bench.markdown import failure, table
from vllm_eagle3.bench.options import check_positive
from vllm_eagle3.bench.output import write_results

# Changes of the settings; None is the loop of train_naive.py.
SIDES: dict[str, dict[str, Any] | None] = {
    "packed": {"packing": True},
    "recomputed": {"packing": True, "recompute": True},
    "padded": {"packing": False},
    "naive": None,
}


@dataclass(frozen=True)
class Job:
    """One side: what is trained on what, and for how many steps.

    Attributes:
        config: settings of ``TrainConfig``.
        naive_rows: documents of a forward pass of the naive loop; None for this trainer.
    """

    target: str
    data: list[Path]
    config: dict[str, Any]
    device: str | None
    warmup: int
    steps: int
    naive_rows: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--target", required=True, help="a Llama checkpoint, folder or hub name")
    add(
        "--data", required=True, type=Path, nargs="+", metavar="DIR",
        help="folders of `data synth`, `data regenerate` or `data convert`",
    )  # fmt: skip
    add("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="default: all")
    add("--batch-tokens", type=int, default=32768, help="tokens of an optimiser step (32768)")
    add("--accumulate", type=int, default=1, help="parts that our sides read a step in (1)")
    add("--max-length", type=int, default=2048, help="longer documents are cut (2048)")
    add("--draft-vocab-size", type=int, help="tokens that the head predicts (as in training)")
    add("--num-ttt-steps", type=int, default=7, help="draft steps trained through (7)")
    add("--steps", type=int, default=20, help="optimiser steps that are timed (20)")
    add("--warmup", type=int, default=3, help="optimiser steps before them (3)")
    add("--naive-rows", type=int, default=8, help="documents of a forward, naive loop (8)")
    add("--device", help="cuda or cpu (default: cuda where there is some)")
    add("--output", "--out", type=Path, required=True, help="JSON file; the table goes beside it")


def run(args: argparse.Namespace) -> int:
    """Measure and write; 0 if every side could be measured, else 1."""
    check_positive(args, "steps", "naive_rows")
    if args.warmup < 0:
        raise ValueError("--warmup must be 0 or more")
    names = ("batch_tokens", "accumulate", "max_length", "draft_vocab_size", "num_ttt_steps")
    settings = {name: getattr(args, name) for name in names}
    sides = {}
    for name in args.sides:
        changes = SIDES[name]
        job = Job(
            target=args.target,
            data=args.data,
            config=settings | (changes or {"packing": False}),
            device=args.device,
            warmup=args.warmup,
            steps=args.steps,
            naive_rows=args.naive_rows if changes is None else None,
        )
        print(f"{name} ...", file=sys.stderr)
        sides[name] = measured_apart(job)
    results = {"target": Path(args.target).name, "settings": settings, "sides": sides}
    text = render(results)
    print(text)
    write_results(args.output, results, text)
    return int(any("error" in side for side in sides.values()))


def measured_apart(job: Job) -> dict[str, Any]:
    """:func:`measure` in a fresh process; ``error`` alone where memory did not suffice.

    Raises:
        ValueError: as training with these settings.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, job).result()


def measure(job: Job) -> dict[str, Any]:
    """Figures of one side.

    Returns:
        ``device``; for each timed step ``step_seconds``, ``step_tokens`` (the assistant's) and
        ``step_slots`` (padding included); ``forward_slots``, of the largest forward;
        ``tokens_per_second``, the median of the steps; and ``peak_memory_gib``, on a GPU of the
        timed steps alone.
    """
    import torch

    from vllm_eagle3.train.distributed import choose_device
    from vllm_eagle3.train.logs import peak_memory_gib

    device = choose_device(job.device)
    seconds, tokens, slots, largest = [], [], [], 0
    try:
        steps = _steps(job, device)
        for _ in islice(steps, job.warmup):
            _wait(device)
        _wait(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        for step_tokens, part_slots in islice(steps, job.steps):
            _wait(device)
            seconds.append(time.perf_counter() - started)
            started += seconds[-1]
            tokens.append(step_tokens)
            slots.append(sum(part_slots))
            largest = max(largest, *part_slots)
    except torch.OutOfMemoryError as error:
        return {"error": str(error)}
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "step_seconds": seconds,
        "step_tokens": tokens,
        "step_slots": slots,
        "forward_slots": largest,
        "tokens_per_second": statistics.median(map(truediv, tokens, seconds)),
        "peak_memory_gib": peak_memory_gib(device),
    }


def _steps(job: Job, device: Any) -> Iterator[tuple[int, list[int]]]:
    """Optimiser steps; each yields tokens of the assistant, and the slots of each forward."""
    import torch

    from vllm_eagle3.bench import train_naive
    from vllm_eagle3.corpus import read_corpus
    from vllm_eagle3.train.distributed import World
    from vllm_eagle3.train.learner import Learner
    from vllm_eagle3.train.loader import Loader
    from vllm_eagle3.train.settings import TrainConfig

    config = TrainConfig(**job.config, epochs=1_000_000)
    torch.manual_seed(config.seed)
    documents = read_corpus(*job.data)
    learner = Learner(job.target, documents, config, device, World())
    loader = Loader(documents, config, World(), learner.settings.num_steps)
    # The same sample for all sides: padded rows.
    sample = Loader(documents, replace(config, packing=False), World()).first()
    learner.initialise(sample.to(device))
    if job.naive_rows is not None:
        sizes = job.naive_rows, config.max_length, config.batch_tokens
        yield from train_naive.steps(learner, documents, *sizes)  # without end
    for batches in loader.steps(0, device):
        learner.optimise(batches, progress=0.5)
        learner.check_finite()
        written = sum(int(batch.assistant_BT.sum()) for batch, _ in batches.parts)
        yield written, [batch.tokens_BT.numel() for batch, _ in batches.parts]


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def render(results: dict[str, Any]) -> str:
    """Markdown of what :func:`run` measured."""
    sides = results["sides"]
    whole = {name: side for name, side in sides.items() if "error" not in side}
    naive = whole.get("naive")
    rows = []
    for name, side in whole.items():
        speed = side["tokens_per_second"]
        ratio = f"{speed / naive['tokens_per_second']:.2f}x" if naive else "-"
        rows.append(
            [
                name,
                f"{speed:,.0f}",
                ratio,
                f"{1000 * statistics.median(side['step_seconds']):,.0f}",
                f"{100 * sum(side['step_tokens']) / sum(side['step_slots']):.0f} %",
                f"{side['forward_slots']:,}",
                f"{side['peak_memory_gib']:.2f}",
            ]
        )
    header = ["", "tokens/s", "over naive", "ms a step", "trained share", "slots at once"]
    header += ["peak GiB"]
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    devices = {side["device"] for side in whole.values()}
    where = f"EAGLE-3 head for {results['target']}, {', '.join(sorted(devices)) or 'nothing'}"
    errors = [failure(name, side["error"]) for name, side in sides.items() if "error" in side]
    note = (
        "Tokens are the assistant's; the trained share is that of all slots of the batches; slots"
        " at once are those of the largest forward, which memory grows with. "
        "Without a GPU the peak is the process's, libraries included."
    )
    return "\n\n".join([f"{where}: {settings}.", table(header, rows), note, *errors]) + "\n"
