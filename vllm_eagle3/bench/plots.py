"""Plots of the results of ``bench speed``: speedup over batch size, and a step's time split."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle3.bench.configurations import PLAIN
from vllm_eagle3.bench.figure import engine_title, subplots
from vllm_eagle3.bench.ratios import HEADLINE
from vllm_eagle3.bench.speed_report import least_step_ms
from vllm_eagle3.bench.steps import CATEGORIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {
    "target": "#4c72b0",
    "sampling": "#8172b3",
    "draft": "#55a868",
    "tree": "#c44e52",
    "other": "#ccb974",
    "idle": "#d9d9d9",
}


def write(results: dict[str, Any], path: Path) -> list[Path]:
    """Write ``<stem>-speedup.png`` and, if steps were profiled, ``<stem>-steps.png``.

    Args:
        results: as ``bench speed`` wrote them.
        path: the results' own; the plots go beside it.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
    """
    written = []
    if results["summary"]:
        written.append(path.with_name(f"{path.stem}-speedup.png"))
        _speedup(results, written[-1])
    if results["profiles"]:
        written.append(path.with_name(f"{path.stem}-steps.png"))
        _steps(results, written[-1])
    return written


def _speedup(results: dict[str, Any], path: Path) -> None:
    temperatures = list(dict.fromkeys(cell["temperature"] for cell in results["summary"]))
    figure, axes = subplots(len(temperatures), 5.5)
    names = [entry["name"] for entry in results["configurations"] if entry["name"] != PLAIN.name]
    for axis, temperature in zip(axes, temperatures, strict=True):
        cells = sorted(
            (cell for cell in results["summary"] if cell["temperature"] == temperature),
            key=lambda cell: cell["batch_size"],
        )
        for name in names:
            _line(axis, cells, name)
        axis.axhline(1, color="black", linewidth=0.8)
        batches = sorted({cell["batch_size"] for cell in cells})
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.set_title(f"T={temperature:g}")
        axis.set_xlabel("batch size")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"decoding, tokens/s over {_reference(results)}")
    axes[-1].legend(fontsize="small")
    figure.suptitle(engine_title(results), fontsize="small")
    figure.savefig(path)


def _reference(results: dict[str, Any]) -> str:
    has_plain = any(cell["over_plain"] for cell in results["summary"])
    return "plain decoding" if has_plain else "the best chain"


def _line(axis: "Axes", cells: Sequence[dict[str, Any]], name: str) -> None:
    """One configuration over batch sizes, with the quartiles of its repeats."""
    points = {}
    for cell in cells:
        ratio = (cell["over_plain"] or cell["over_best_chain"]).get(name, {}).get(HEADLINE)
        if ratio:
            points.setdefault(cell["batch_size"], ratio)
    if not points:
        return
    medians = [ratio["median"] for ratio in points.values()]
    low, high = zip(*(ratio["quartiles"] for ratio in points.values()), strict=True)
    style = "o-" if name.startswith("tree") else "s--"
    (line,) = axis.plot(list(points), medians, style, label=name, markersize=4)
    axis.fill_between(list(points), low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _steps(results: dict[str, Any], path: Path) -> None:
    profiles = results["profiles"]
    batches = sorted({profile["batch_size"] for profile in profiles})
    figure, axes = subplots(len(batches), 1.5 + 0.6 * len(results["configurations"]))
    for axis, batch_size in zip(axes, batches, strict=True):
        shown = [profile for profile in profiles if profile["batch_size"] == batch_size]
        bottoms = [0.0] * len(shown)
        positions = range(len(shown))
        for category in CATEGORIES:
            heights = [profile["ms"][category] for profile in shown]
            axis.bar(positions, heights, 0.7, bottoms, label=category, color=_COLORS[category])
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        least = [least_step_ms(results, profile["name"], batch_size) for profile in shown]
        if all(least):
            axis.scatter(
                positions, least, marker="_", s=300, color="black", label="least possible", zorder=3
            )
        axis.set_xticks(positions, [profile["name"] for profile in shown], rotation=30, ha="right")
        axis.set_title(f"batch {batch_size}")
    axes[0].set_ylabel("ms for each step")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", loc="outside right")
    figure.suptitle(engine_title(results), fontsize="small")
    figure.savefig(path)
