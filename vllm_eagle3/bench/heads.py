"""``vllm-eagle3 bench heads``: several heads of one target in one table.

Out of the files of ``vllm-eagle3 eval``, one for each head: tau of every chain and tree by set of
questions, and over the tokens that each head was trained on.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.bench.markdown import table
from vllm_eagle3.bench.output import PLOTS_REMEDY, write_results
from vllm_eagle3.bench.report import label, title

# Settings without which tau of two heads does not compare.
_SHARED = ("target", "data", "limit", "max_tokens", "max_model_len", "seed", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add(
        "results",
        nargs="+",
        metavar="[NAME=]FILE",
        help="JSON files of vllm-eagle3 eval; a name for the table, else the head's folder's",
    )
    add(
        "--output",
        "--out",
        type=Path,
        default=Path("heads.json"),
        help="JSON file; the table (.md) and a plot (.png) go beside it (default: heads.json)",
    )


def run(args: argparse.Namespace) -> int:
    """Write and print the table.

    Raises:
        ValueError: a file holds something else, or results that do not compare.
    """
    results = collect([_read(text) for text in args.results])
    text = render(results)
    print(text)
    write_results(args.output, results, text)
    try:
        from vllm_eagle3.bench import heads_plot

        heads_plot.write(results, args.output.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"vllm-eagle3: no plot, {error}: {PLOTS_REMEDY}", file=sys.stderr)
    return 0


def collect(evaluations: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """One row for each chain or tree of each head.

    Args:
        evaluations: name and results of each head.

    Raises:
        ValueError: two heads share a name, or were not evaluated alike.
    """
    names = [name for name, _ in evaluations]
    if len(set(names)) < len(names):
        raise ValueError(f"two results are named {_twice(names)!r}: give names, as in NAME=FILE")
    (first_name, first), *others = [(name, _settings(one)) for name, one in evaluations]
    for name, other in others:
        for key in _SHARED:
            one, two = first[key], other[key]
            if one != two:
                raise ValueError(
                    f"{first_name} and {name} do not compare: {key} is {one!r} and {two!r}"
                )
    return {
        "kind": "heads",
        "settings": first,
        "notes": evaluations[0][1]["notes"],
        "rows": [row for name, results in evaluations for row in _rows(name, results)],
    }


def render(results: dict[str, Any]) -> str:
    """The table, as Markdown."""
    columns = list(dict.fromkeys(key for row in results["rows"] for key in _columns(row)))
    rows = []
    for row in results["rows"]:
        taus = _columns(row)
        tokens = row["corpus_tokens"]
        rows.append(
            [
                row["name"],
                row["configuration"],
                f"{tokens / 1e6:.1f} M" if tokens else "-",
                *(f"{taus[key]:.2f}" if taus.get(key) else "-" for key in columns),
            ]
        )
    header = ["head", "drafts", "trained on"]
    header += [f"{_place(dataset)}, T={temperature:g}" for dataset, temperature in columns]
    caption = "Mean acceptance length tau, tokens for each target forward, served by vLLM."
    return "\n\n".join([caption, *results["notes"], table(header, rows)]) + "\n"


def _columns(row: dict[str, Any]) -> dict[tuple[str | None, float], float | None]:
    return {(tau["dataset"], tau["temperature"]): tau["tau"] for tau in row["taus"]}


def _place(dataset: str | None) -> str:
    return title(dataset) if dataset else "all"


def _settings(results: dict[str, Any]) -> dict[str, Any]:
    """What must be equal; files by their names, wherever they lie."""
    settings = {key: results["settings"].get(key) for key in _SHARED}
    settings["target"] = Path(str(settings["target"])).name
    settings["data"] = [Path(path).stem for path in settings["data"] or ()]
    return settings


def _rows(name: str, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    training = results["training"]
    for entry in results["configurations"]:
        if entry["error"]:
            raise ValueError(f"{name}: {label(entry)} failed: run its eval again")
        yield {
            "name": name,
            "configuration": label(entry),
            "objective": training.get("config", {}).get("objective"),
            "corpus_tokens": training.get("tokens"),
            "tokens_seen": training.get("tokens_seen"),
            "taus": [
                {
                    "dataset": task["dataset"],
                    "temperature": task["temperature"],
                    "tau": task["served"]["tau"],
                }
                for task in entry["tasks"]
                if task["category"] is None
            ],
        }


def _read(text: str) -> tuple[str, dict[str, Any]]:
    name, _, path = text.rpartition("=")
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no results of `vllm-eagle3 eval`: {error}") from error
    if not isinstance(results, dict) or results.get("kind") != "eval":
        raise ValueError(f"{path} is no results of `vllm-eagle3 eval`")
    return name or Path(results["settings"]["head"]).name, results


def _twice(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)
