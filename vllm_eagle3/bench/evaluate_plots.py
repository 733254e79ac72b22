"""Plots of the results of ``vllm-eagle3 eval``: by depth, by task, by context length."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle3.bench.evaluate_report import task_title, total
from vllm_eagle3.bench.figure import engine_title, subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entries = Sequence[dict[str, Any]]


def write(results: dict[str, Any], path: Path) -> list[Path]:
    """Write ``<stem>-depth.png``, ``-task.png`` and ``-context.png``, predictions dashed.

    Args:
        results: as ``eval`` wrote them.
        path: the results' own; the plots go beside it. None are made of nothing.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
    """
    entries = [entry for entry in results["configurations"] if entry["tasks"]]
    temperatures = list(dict.fromkeys(t["temperature"] for e in entries for t in e["tasks"]))
    written = []
    if entries:
        kinds = {"depth": (_depth, 5.5), "task": (_task, 7.5), "context": (_context, 5.5)}
        for name, (draw, width) in kinds.items():
            written.append(path.with_name(f"{path.stem}-{name}.png"))
            _draw(results, entries, temperatures, written[-1], draw, width)
    return written


def _draw(
    results: dict[str, Any],
    entries: Entries,
    temperatures: Sequence[float],
    path: Path,
    draw: "Callable[[Axes, Entries, float], None]",
    width: float,
) -> None:
    figure, axes = subplots(len(temperatures), width)
    for axis, temperature in zip(axes, temperatures, strict=True):
        draw(axis, entries, temperature)
        axis.set_title(f"T={temperature:g}")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize="small")
    figure.suptitle(engine_title(results), fontsize="small")
    figure.savefig(path)


def _lines(
    axis: "Axes",
    x: Sequence[float],
    served: Sequence[float],
    predicted: Sequence[float] | None,
    name: str,
) -> None:
    (line,) = axis.plot(x, served, "o-", label=name, markersize=4)
    if predicted:
        style = {"color": line.get_color(), "markersize": 5, "label": f"{name}, predicted"}
        axis.plot(x, predicted, "x--", **style)


def _depth(axis: "Axes", entries: Entries, temperature: float) -> None:
    for entry in entries:
        figures = total(entry, temperature)
        if figures and figures["served"]["rounds"]:
            predicted = figures["predicted"] and figures["predicted"]["accepted"]
            depths = range(1, entry["depth"] + 1)
            _lines(axis, depths, figures["served"]["accepted"], predicted, entry["name"])
    axis.set_xticks(range(1, max(entry["depth"] for entry in entries) + 1))
    axis.set_xlabel("depth of a draft")
    axis.set_ylabel("share of rounds that accept it")
    axis.set_ylim(0, 1)


def _context(axis: "Axes", entries: Entries, temperature: float) -> None:
    ticks: dict[int, str] = {}
    for entry in entries:
        found = [c for c in entry["contexts"] if c["temperature"] == temperature]
        served = [c["served"]["tau"] for c in found]
        has_predicted = all(c["predicted"] for c in found)
        predicted = [c["predicted"]["tau"] for c in found] if has_predicted else None
        x = [c["last"] + 1 for c in found]
        ticks |= {c["last"] + 1: f"{c['first']} to {c['last']}" for c in found}
        if found:
            _lines(axis, x, served, predicted, entry["name"])
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ticks), list(ticks.values()), rotation=30, ha="right")
    axis.set_xlabel("tokens of context at the beginning of a round")
    axis.set_ylabel("tau, tokens for each target forward")


def _task(axis: "Axes", entries: Entries, temperature: float) -> None:
    width = 0.8 / len(entries)
    titles: list[str] = []
    marks: list[tuple[float, float]] = []
    for number, entry in enumerate(entries):
        found = [t for t in entry["tasks"] if t["temperature"] == temperature]
        titles = titles or [task_title(task) for task in found]
        x = [place + number * width for place in range(len(found))]
        axis.bar(x, [t["served"]["tau"] or 0 for t in found], width, label=entry["name"])
        for at, task in zip(x, found, strict=True):
            if task["predicted"]:
                marks.append((at, task["predicted"]["tau"]))
    if marks:
        style = {"marker": "_", "s": 60, "color": "black", "zorder": 3, "label": "predicted"}
        axis.scatter(*zip(*marks, strict=True), **style)
    middle = 0.4 - width / 2
    places = [place + middle for place in range(len(titles))]
    axis.set_xticks(places, titles, rotation=45, ha="right")
    axis.set_ylabel("tau, tokens for each target forward")
