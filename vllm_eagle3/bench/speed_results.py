"""The results of ``bench speed``: collected, summarised, and written after every cell."""

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.bench import speed_report, target
from vllm_eagle3.bench.configurations import Configuration
from vllm_eagle3.bench.limits import read_cost
from vllm_eagle3.bench.options import recorded
from vllm_eagle3.bench.output import write_results
from vllm_eagle3.bench.ratios import HEADLINE, summarize
from vllm_eagle3.bench.schedule import Cell, Prompt


class SpeedResults:
    """All figures, raw and summarised, in one dictionary that JSON can hold.

    Attributes:
        data: see :meth:`create` and the ``add`` methods for its keys.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data

    @classmethod
    def create(
        cls,
        args: argparse.Namespace,
        configurations: Sequence[Configuration],
        prompts: Sequence[Prompt],
    ) -> "SpeedResults":
        """Empty results of the command's settings."""
        lengths = [len(prompt.tokens) for prompt in prompts]
        cost = read_cost(args.target, args.head)
        data = {
            "kind": "speed",
            "settings": recorded(args) | {"data": [path.name for path in args.data]},
            "environment": {
                "commit": _commit(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            },
            "notes": target.notes(args.target),
            "target_shape": {
                key: value
                for key, value in target.read_config(args.target).items()
                if isinstance(value, int) and not isinstance(value, bool)
            },
            "prompts": {
                "count": len(lengths),
                "mean_tokens": sum(lengths) / len(lengths),
                "max_tokens": max(lengths),
            },
            "step_cost": cost.to_dict() if cost else None,
            "configurations": [
                {
                    "name": configuration.name,
                    "num_speculative_tokens": configuration.num_speculative_tokens,
                    "shape": configuration.shape,
                    "engine": None,
                    "error": None,
                }
                for configuration in configurations
            ],
            "rounds": [],
            "cells": [],
            "summary": [],
            "profiles": [],
        }
        return cls(args.output, data)

    @property
    def errors(self) -> list[str]:
        """What went wrong, for each configuration that failed."""
        return [entry["error"] for entry in self.data["configurations"] if entry["error"]]

    def begin_round(self, names: Sequence[str]) -> int:
        """Note who lives side by side; returns the round's number."""
        self.data["rounds"].append(list(names))
        return len(self.data["rounds"]) - 1

    def ready(self, name: str, engine: Mapping[str, Any]) -> None:
        """Take in what an engine told about itself."""
        engine = {key: value for key, value in engine.items() if key != "event"}
        self._entry(name)["engine"] = engine
        notes = []
        if "CPU" in engine["device"]:
            notes.append("Measured on a CPU through Triton's interpreter: a test, no speeds.")
        elif engine["enforce_eager"] or engine["cudagraph_mode"] == "NONE":
            notes.append("Measured without CUDA graphs: no fair comparison.")
        notes += [f"`{name}`: {warning}" for warning in engine["graph_warnings"]]
        self.data["notes"] += [note for note in notes if note not in self.data["notes"]]

    def failed(self, name: str, error: str) -> None:
        """Note why a configuration has no further figures, and write."""
        self._entry(name)["error"] = error
        self.write()

    def add_cell(self, cell: Cell, round_number: int, repeats: list[dict[str, Any]]) -> None:
        """Add all repeats of a cell, and write."""
        raw = {
            "batch_size": cell.batch_size,
            "temperature": cell.temperature,
            "round": round_number,
            "repeats": repeats,
        }
        self.data["cells"].append(raw)
        self.data["summary"].append(summarize(raw))
        self.write()

    def add_profile(
        self, name: str, batch_size: int, temperature: float, split: dict[str, Any]
    ) -> None:
        """Add a step's split, and write."""
        where = {"name": name, "batch_size": batch_size, "temperature": temperature}
        self.data["profiles"].append(where | split)
        self.write()

    def summaries(self) -> list[dict[str, Any]]:
        """The summaries of all cells so far."""
        return self.data["summary"]

    def headline(self) -> str:
        """The last cell in a line: the best tree over the best chain."""
        ratios = {
            name: ratio[HEADLINE]["median"]
            for name, ratio in self.data["summary"][-1]["over_best_chain"].items()
            if ratio[HEADLINE]
        }
        if not ratios:
            return ""
        best = max(ratios, key=lambda name: ratios[name])
        return f"{best} / {self.data['summary'][-1]['best_chain']} = {ratios[best]:.3f}"

    def render(self) -> str:
        """The tables, as Markdown."""
        return speed_report.render(self.data)

    def write(self) -> None:
        """Write JSON and Markdown; see :func:`vllm_eagle3.bench.output.write_results`."""
        write_results(self.path, self.data, self.render())

    def write_plots(self) -> None:
        """Write the PNGs, where Matplotlib is installed."""
        self.write()
        try:
            from vllm_eagle3.bench import plots

            plots.write(self.data, self.path)
        except ModuleNotFoundError as error:
            print(
                f"vllm-eagle3: no plots, {error}; elsewhere: vllm-eagle3 bench plot {self.path}",
                file=sys.stderr,
            )

    def _entry(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.data["configurations"] if entry["name"] == name)


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
