"""``vllm-eagle3 bench plot``: the tables and plots of results that lie in a file."""

import argparse
import json
from pathlib import Path

from vllm_eagle3.bench import plots, speed_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("results", type=Path, help="JSON file of vllm-eagle3 bench speed")


def run(args: argparse.Namespace) -> int:
    """Write Markdown and PNGs beside the results.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        results = json.loads(args.results.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{args.results}: not JSON ({error})") from error
    if not isinstance(results, dict) or results.get("kind") != "speed":
        raise ValueError(f"{args.results}: not the results of `vllm-eagle3 bench speed`")
    tables = speed_report.render(results)
    args.results.with_suffix(".md").write_text(tables, encoding="utf-8")
    for path in plots.write(results, args.results):
        print(path)
    return 0
