"""The results of ``bench speed`` as Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm_eagle3.bench.configurations import Configuration
from vllm_eagle3.bench.limits import StepCost
from vllm_eagle3.bench.markdown import failure, table
from vllm_eagle3.bench.ratios import HEADLINE, WHOLE
from vllm_eagle3.bench.steps import CATEGORIES

Cell = dict[str, Any]


def render(results: dict[str, Any]) -> str:
    """All tables and every error, ready for a README."""
    parts = [_heading(results), *results["notes"]]
    names = [entry["name"] for entry in results["configurations"]]
    for temperature in dict.fromkeys(cell["temperature"] for cell in results["summary"]):
        cells = [cell for cell in results["summary"] if cell["temperature"] == temperature]
        title = f"T={temperature:g}"
        parts += [
            f"### {title}: tokens/s while every request of the batch decodes",
            _by_batch(cells, names, lambda cell, name: _rate(cell, name, HEADLINE)),
            f"### {title}: over the best chain, median of the repeats [min, max]",
            _by_batch(cells, names, _over_chain, first=("best chain", _best_chain)),
            f"### {title}: tokens/s of whole batches, from the prompts to the last answer's end",
            _by_batch(cells, names, lambda cell, name: _rate(cell, name, WHOLE)),
            f"### {title}: mean acceptance length",
            _by_batch(cells, names, _tau),
            f"### {title}: ms for each step [least possible]",
            _by_batch(cells, names, lambda cell, name: _step(results, cell, name)),
        ]
    if results["profiles"]:
        parts += ["### A step's time in ms, under the profiler", _profiles(results)]
    parts += [
        failure(entry["name"], entry["error"])
        for entry in results["configurations"]
        if entry["error"]
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(results: dict[str, Any]) -> str:
    settings, prompts = results["settings"], results["prompts"]
    engine = next((e["engine"] for e in results["configurations"] if e["engine"]), {})
    parts = [
        f"{engine.get('device', 'no engine stood')}",
        f"vLLM {engine.get('vllm', '?')}, torch {engine.get('torch', '?')}",
        str(engine.get("dtype", "?")),
        f"{settings['max_tokens']} tokens of output, prompts of"
        f" {prompts['mean_tokens']:.0f} tokens on average (MT-bench, HumanEval and GSM8K mixed)"
        if settings["data"] == ["mt_bench.jsonl", "humaneval.jsonl", "gsm8k.jsonl"]
        else f"{settings['max_tokens']} tokens of output",
        f"{settings['repeats']} repeats in rotating order, medians",
    ]
    return "; ".join(parts) + "."


def _by_batch(
    cells: Sequence[Cell],
    names: Sequence[str],
    show: Callable[[Cell, str], str],
    first: tuple[str, Callable[[Cell], str]] | None = None,
) -> str:
    """Rows are configurations, columns batch sizes; a row with nothing to show is left out."""
    batches = sorted({cell["batch_size"] for cell in cells})
    rows = []
    if first:
        rows.append([first[0], *(_first(cells, b, lambda c: first[1](c)) for b in batches)])
    for name in names:
        row = [_first(cells, b, lambda c, name=name: show(c, name)) for b in batches]
        if any(row):
            rows.append([f"`{name}`", *row])
    return table(["batch", *map(str, batches)], rows) if rows else ""


def _first(cells: Sequence[Cell], batch_size: int, show: Callable[[Cell], str]) -> str:
    """What the first cell of a batch size has to show: anchors are in several rounds."""
    shown = (show(cell) for cell in cells if cell["batch_size"] == batch_size)
    return next(filter(None, shown), "")


def _figure(cell: Cell, name: str, key: str) -> Any:
    return cell["configurations"].get(name, {}).get(key)


def _rate(cell: Cell, name: str, measure: str) -> str:
    figure = _figure(cell, name, measure)
    return f"{figure['median']:.0f}" if figure else ""


def _best_chain(cell: Cell) -> str:
    return f"`{cell['best_chain']}`" if cell["best_chain"] else ""


def _over_chain(cell: Cell, name: str) -> str:
    ratio = cell["over_best_chain"].get(name, {}).get(HEADLINE)
    return f"{ratio['median']:.3f} [{ratio['min']:.2f}, {ratio['max']:.2f}]" if ratio else ""


def _tau(cell: Cell, name: str) -> str:
    tau = _figure(cell, name, "tau")
    return f"{tau:.2f}" if tau else ""


def _step(results: dict[str, Any], cell: Cell, name: str) -> str:
    figure = _figure(cell, name, "step_ms")
    if not figure:
        return ""
    least = least_step_ms(results, name, cell["batch_size"])
    return f"{figure['median']:.2f}" + (f" [{least:.2f}]" if least else "")


def least_step_ms(results: dict[str, Any], name: str, batch_size: int) -> float | None:
    """What :mod:`vllm_eagle3.bench.limits` says of a step, halfway through the outputs."""
    if not results["step_cost"]:
        return None
    entry = next(entry for entry in results["configurations"] if entry["name"] == name)
    context = results["prompts"]["mean_tokens"] + results["settings"]["max_tokens"] / 2
    cost = StepCost(**results["step_cost"])
    configuration = Configuration(name, entry["num_speculative_tokens"], entry["shape"])
    return cost.step_ms(batch_size, context, configuration.draft_forwards(batch_size))


def _profiles(results: dict[str, Any]) -> str:
    header = ["configuration", "batch", "unprofiled", "step", *CATEGORIES, "not target or draft"]
    profiles = sorted(results["profiles"], key=lambda profile: profile["batch_size"])
    rows = [
        [
            f"`{profile['name']}`",
            str(profile["batch_size"]),
            _unprofiled(results, profile),
            f"{profile['step_ms']:.3f}",
            *(f"{profile['ms'][category]:.3f}" for category in CATEGORIES),
            f"{profile['step_ms'] - profile['ms']['target'] - profile['ms']['draft']:.3f}",
        ]
        for profile in profiles
    ]
    return table(header, rows)


def _unprofiled(results: dict[str, Any], profile: dict[str, Any]) -> str:
    """The same step's time without the profiler, which slows steps down."""
    setting = profile["batch_size"], profile["temperature"]
    cells = [c for c in results["summary"] if (c["batch_size"], c["temperature"]) == setting]
    figures = [figure for c in cells if (figure := _figure(c, profile["name"], "step_ms"))]
    return f"{figures[0]['median']:.3f}" if figures else ""
