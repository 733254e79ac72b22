"""The results of ``vllm-eagle3 eval`` as Markdown."""

from collections.abc import Sequence
from typing import Any

from vllm_eagle3.bench.markdown import failure, table
from vllm_eagle3.bench.report import label, shortfalls, title

_FAILED = "failed"


def render(results: dict[str, Any]) -> str:
    """Tables by task, by depth and by context length, and every error."""
    entries = [entry for entry in results["configurations"] if entry["tasks"]]
    temperatures = list(dict.fromkeys(t["temperature"] for e in entries for t in e["tasks"]))
    limit = results["difference_limit_percent"]
    parts = [*results["notes"]]
    for temperature in temperatures:
        parts += [
            f"Mean acceptance length tau at T={temperature:g}, tokens for each target forward:"
            " served by vLLM, and predicted offline on the same answers (±: the standard error of"
            f" what chance draws; bold: more than {limit:g} % apart).",
            _tasks(entries, temperature),
        ]
    if entries:
        parts += [
            "Share of rounds that accept a draft of each depth and emit a token after it, in"
            " percent, all tasks.",
            _depths(entries, temperatures),
            "Tau by the length of the context at the beginning of a round (tokens), all tasks.",
            _contexts(entries, temperatures),
        ]
    parts += [_verdict(entries, limit)] if entries else []
    if results["prediction_error"]:
        parts.append(failure("prediction", results["prediction_error"]))
    parts += shortfalls(results["configurations"])
    return "\n\n".join(parts) + "\n"


def task_title(task: dict[str, Any]) -> str:
    """A set's name, a category below it, or all of them."""
    if task["category"]:
        return f"- {task['category']}"
    return title(task["dataset"]) if task["dataset"] else "all"


def total(entry: dict[str, Any], temperature: float) -> dict[str, Any] | None:
    """The figures over all tasks; None of a pass that did not finish."""
    whole = [t for t in entry["tasks"] if t["temperature"] == temperature and t["category"] is None]
    return whole[-1] if whole else None


def _tasks(entries: Sequence[dict[str, Any]], temperature: float) -> str:
    header = ["task"]
    for entry in entries:
        header += [f"{label(entry)}: served", "predicted", "difference"]
    columns = [[t for t in e["tasks"] if t["temperature"] == temperature] for e in entries]
    rows = []
    for index, task in enumerate(max(columns, key=len)):
        row = [task_title(task)]
        for column in columns:
            row += _cells(column[index]) if column else [_FAILED] * 3
        rows.append(row)
    return table(header, rows)


def _cells(figures: dict[str, Any]) -> list[str]:
    predicted = figures["predicted"]
    return [
        _number(figures["served"]["tau"]),
        _number(predicted["tau"]) + _error(predicted) if predicted else "-",
        _difference(figures),
    ]


def _error(predicted: dict[str, Any]) -> str:
    error = predicted["standard_error"]
    return f" ± {error:.2f}" if error >= 0.005 else ""


def _difference(figures: dict[str, Any]) -> str:
    difference = figures["difference_percent"]
    if difference is None:
        return "-"
    text = f"{difference:+.1f} %"
    return f"**{text}**" if figures["flagged"] else text


def _depths(entries: Sequence[dict[str, Any]], temperatures: Sequence[float]) -> str:
    depth = max(entry["depth"] for entry in entries)
    rows = []
    for entry in entries:
        for temperature in temperatures:
            figures = total(entry, temperature)
            for side in ("served", "predicted"):
                if figures and figures[side]:
                    shares = [_percent(share) for share in figures[side]["accepted"]]
                    name = f"{label(entry)}, T={temperature:g}, {side}"
                    rows.append([name, *shares, *["-"] * (depth - len(shares))])
    return table(["drafts", *map(str, range(1, depth + 1))], rows)


def _contexts(entries: Sequence[dict[str, Any]], temperatures: Sequence[float]) -> str:
    columns = [(entry, t) for entry in entries for t in temperatures]
    ranges = sorted({(c["first"], c["last"]) for entry in entries for c in entry["contexts"]})
    rows = []
    for place in ranges:
        row = [f"{place[0]} to {place[1]}"]
        for entry, temperature in columns:
            found = [
                c
                for c in entry["contexts"]
                if (c["first"], c["last"], c["temperature"]) == (*place, temperature)
            ]
            row.append(_both(found[0]) if found else "-")
        rows.append(row)
    header = [f"{label(entry)}, T={t:g}: served (predicted)" for entry, t in columns]
    return table(["context", *header], rows)


def _both(figures: dict[str, Any]) -> str:
    predicted = figures["predicted"]
    text = _number(figures["served"]["tau"])
    return f"{text} ({_number(predicted['tau'])})" if predicted else text


def _verdict(entries: Sequence[dict[str, Any]], limit: float) -> str:
    compared = [t for e in entries for t in e["tasks"] if t["difference_percent"] is not None]
    if not compared:
        return "Nothing was predicted."
    flagged = [t for t in compared if t["flagged"]]
    real = [t for t in flagged if _off(t) > 2 * t["predicted"]["standard_error"]]
    text = f"Predicted and served tau differ by more than {limit:g} % in {len(flagged)} of"
    text += f" {len(compared)} places"
    if flagged:
        text += f", in {len(real)} of them by more than two standard errors of the draws"
    replayed = max(abs(_replayed_off(t)) for t in compared)
    return (
        f"{text}. Drafted offline along the very text, which leaves nothing to chance, tau is at"
        f" most {replayed:.1f} % off."
    )


def _replayed_off(figures: dict[str, Any]) -> float:
    return 100 * (figures["predicted"]["tau_of_text"] / figures["served"]["tau"] - 1)


def _off(figures: dict[str, Any]) -> float:
    return abs(figures["predicted"]["tau"] - figures["served"]["tau"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
