"""The analysis of training data as tables to read."""

from collections.abc import Sequence
from typing import Any

_ALIKE = 0.7  # of what the data shares with itself


def report(result: dict[str, Any]) -> str:
    """Tables of what :func:`vllm_eagle3.data.analyse.analyse` found, and what to make of it."""
    log = result.get("log")
    served = log and log["answer_tokens"]
    parts = [
        f"{result['documents']:,} documents, {result['tokens']:,} tokens, of which the assistant"
        f" wrote {result['assistant_tokens']:,}",
        _table(
            ["tokens of", *result["document_tokens"]],
            [_lengths("documents", result["document_tokens"])]
            + [_lengths("answers", result["answer_tokens"])]
            + ([_lengths("the log's answers", served)] if served else []),
        ),
        _table(
            ["turns", "documents"],
            [[str(turns), f"{count:,}"] for turns, count in result["turns"].items()],
        ),
        _table(
            ["cluster", "data", "log", "typical"],
            [
                [str(n), _percent(c["share"]), _percent(c["log_share"]), ", ".join(c["typical"])]
                for n, c in enumerate(result["clusters"], 1)
            ],
        ),
        _table(
            ["draft vocabulary", "covers of the data", "of held-out data", "of the log's answers"],
            [
                [f"{row['size']:,}", *(_percent(row[key]) for key in ("data", "held_out", "log"))]
                for row in result["vocabulary"]
            ],
        ),
    ]
    if "scripts" in result:
        shares = [f"{name} {_percent(share)}" for name, share in result["scripts"].items()]
        parts.insert(3, "letters: " + ", ".join(shares[:6]))
    if log:
        parts.append(_overlap(log))
    return "\n\n".join(parts)


def _overlap(log: dict[str, Any]) -> str:
    table = _table(
        ["found in the data", "of the log", "of held-out data"],
        [
            ["tokens", _percent(log["tokens_in_data"]), _percent(log["held_out_tokens_in_data"])],
            ["4-grams", _percent(log["4grams_in_data"]), _percent(log["held_out_4grams_in_data"])],
        ],
    )
    yardstick = log["held_out_4grams_in_data"]
    if yardstick is None:
        verdict = "These are too few documents to tell whether the data resembles this log."
    elif log["4grams_in_data"] >= _ALIKE * yardstick:
        verdict = "The data resembles this log about as much as itself."
    else:
        verdict = (
            "The data resembles this log little: let the target answer prompts of your own"
            " traffic (vllm-eagle3 data regenerate) and add them."
        )
    unreadable = f", {log['unreadable']:,} unreadable lines" if log["unreadable"] else ""
    head = f"log: {log['conversations']:,} conversations, {log['tokens']:,} tokens{unreadable}"
    return f"{head}\n\n{table}\n\n{verdict}"


def _lengths(name: str, figures: dict[str, float]) -> list[str]:
    return [name, *(f"{value:,.0f}" for value in figures.values())]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, rule, *rows)
    ]
    return "\n".join(lines)
