"""The figures and the table of ``vllm-eagle3 bench serving``."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from vllm_eagle3.bench.markdown import failure, table

# Column of the table: key of vLLM's client.
FIGURES = {
    "TTFT p50": "p50_ttft_ms",
    "TTFT p99": "p99_ttft_ms",
    "ITL p50": "p50_itl_ms",
    "ITL p99": "p99_itl_ms",
    "TPOT p50": "p50_tpot_ms",
    "tokens/s": "output_throughput",
}


def summarize(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the repeats, for each number of chats at once and each configuration."""
    cells: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        cells.setdefault((run["concurrency"], run["name"]), []).append(run)
    return [
        {
            "name": name,
            "concurrency": concurrency,
            "repeats": len(repeats),
            **{
                key: median(values)
                for key in FIGURES.values()
                if (values := [run[key] for run in repeats if key in run])
            },
        }
        for (concurrency, name), repeats in cells.items()
    ]


def render(results: Mapping[str, Any]) -> str:
    """One table, and every error."""
    settings = results["settings"]
    rows = [
        [
            f"`{cell['name']}`",
            str(cell["concurrency"]),
            str(cell["repeats"]),
            *(f"{cell[key]:.2f}" if key in cell else "-" for key in FIGURES.values()),
        ]
        for cell in sorted(results["summary"], key=lambda cell: cell["concurrency"])
    ]
    parts = [
        f"`vllm bench serve`: streaming chats, {settings['max_tokens']} tokens each,"
        f" T={settings['temperature']:g}; milliseconds, medians over the repeats.",
        *results["notes"],
        table(["configuration", "at once", "repeats", *FIGURES], rows),
    ]
    parts += [failure(*item) for item in results["errors"].items()]
    return "\n\n".join(parts) + "\n"
