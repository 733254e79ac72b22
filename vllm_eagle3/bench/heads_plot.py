"""Tau over the tokens that heads were trained on: the scaling of a head with its data."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from vllm_eagle3.bench.figure import subplots


def write(results: dict[str, Any], path: Path) -> Path:
    """Draw one line for each objective and way of drafting, one plot for each temperature.

    A line bears the name of the head that was trained on the most.

    Args:
        results: as ``bench heads`` wrote them; heads without a record of their training are
            left out.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
    """
    rows = [row for row in results["rows"] if row["corpus_tokens"]]
    temperatures = sorted({tau["temperature"] for row in rows for tau in row["taus"]})
    figure, axes = subplots(max(1, len(temperatures)), 5.5)
    for axis, temperature in zip(axes, temperatures, strict=False):
        lines = defaultdict(list)
        for row in rows:
            if (tau := _overall(row, temperature)) is not None:
                line = row["objective"] or row["name"], row["configuration"]
                lines[line].append((row["corpus_tokens"] / 1e6, tau, row["name"]))
        for points in map(sorted, lines.values()):
            tokens, taus, names = zip(*points, strict=True)
            axis.plot(tokens, taus, marker="o", label=names[-1])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("training tokens, millions")
        axis.set_title(f"T={temperature:g}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set_ylabel("tau")
    figure.savefig(path)
    return path


def _overall(row: dict[str, Any], temperature: float) -> float | None:
    """Over all sets: the last of a temperature's figures."""
    taus = [tau["tau"] for tau in row["taus"] if tau["temperature"] == temperature]
    return taus[-1] if taus else None
