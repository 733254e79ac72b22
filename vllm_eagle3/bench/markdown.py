"""The parts of Markdown that the benchmarks' reports share."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are aligned to the right."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def failure(name: str, error: str) -> str:
    """Why a configuration has no figures, or not all."""
    return f"`{name}` failed:\n\n```\n{error}\n```"
