"""``vllm-eagle3 bench plot``: tables and plots of results that lie in files."""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.bench import plots, speed_report
from vllm_eagle3.bench.output import write_results, write_tables

# Settings without which two runs cannot share a table.
_SHARED = ("target", "head", "max_tokens", "max_prompt", "prompts_per_repeat", "seed", "data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="JSON files of vllm-eagle3 bench speed")
    add(
        "--output",
        "--out",
        type=Path,
        help="JSON file of several together (default: the first, in place)",
    )


def run(args: argparse.Namespace) -> int:
    """Write Markdown and PNGs beside the results.

    Raises:
        ValueError: a file holds something else, or results that do not go together.
    """
    results = merge([_read(path) for path in args.results])
    path, text = args.output or args.results[0], speed_report.render(results)
    if args.output:
        write_results(path, results, text)
    elif len(args.results) > 1:
        raise ValueError("several results: give --output")
    else:
        write_tables(path, text)
    for written in plots.write(results, path):
        print(written)
    return 0


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Cells and profiles of several runs in one; every ratio remains one of a single run.

    Raises:
        ValueError: the runs differ in what their tables do not show.
    """
    merged = copy.deepcopy(parts[0])
    for part in parts[1:]:
        part = copy.deepcopy(part)
        for key in _SHARED:
            one, other = merged["settings"].get(key), part["settings"].get(key)
            if one != other:
                raise ValueError(f"these runs do not go together: {key} is {one!r} and {other!r}")
        engines = {_engine(merged), _engine(part)} - {None}
        if len(engines) > 1:
            raise ValueError(f"these runs do not go together: {' and '.join(sorted(engines))}")
        known = {entry["name"]: entry for entry in merged["configurations"]}
        for entry in part["configurations"]:
            if entry["name"] not in known:
                merged["configurations"].append(entry)
            elif known[entry["name"]]["engine"] is None:
                known[entry["name"]].update(entry)
        for cell in [*part["cells"], *part["summary"]]:
            cell["round"] += len(merged["rounds"])
        for key in ("rounds", "cells", "summary", "profiles"):
            merged[key] += part[key]
        merged["notes"] += [note for note in part["notes"] if note not in merged["notes"]]
    return merged


def _engine(results: dict[str, Any]) -> str | None:
    for entry in results["configurations"]:
        if engine := entry["engine"]:
            return f"{engine['device']} with vLLM {engine['vllm']}, {engine['dtype']}"
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(results, dict) or results.get("kind") != "speed":
        raise ValueError(f"{path}: not the results of `vllm-eagle3 bench speed`")
    return results
