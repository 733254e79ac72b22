"""Medians of the repeats, and ratios of configurations that ran in the same repeat."""

from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

# Measures of a run, by name: (numerator, denominator), both summed over the run's waves.
# "full" is a server under constant load: from the last first token on, while no request has
# ended. Beyond that span a wave drains, and what is measured is its slowest answer.
RATES = {
    "tokens_per_second": ("tokens", "seconds"),
    "decode_tokens_per_second": ("decode_tokens", "decode_seconds"),
    "full_tokens_per_second": ("full_tokens", "full_seconds"),
}
HEADLINE = "full_tokens_per_second"
WHOLE = "tokens_per_second"


def rate(run: Mapping[str, Any], measure: str) -> float | None:
    """One of ``RATES`` of one run; None where its span is empty."""
    numerator, denominator = (sum(wave[key] for wave in run["waves"]) for key in RATES[measure])
    return numerator / denominator if denominator > 0 and numerator > 0 else None


def summarize(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a cell: each configuration's medians, and trees against the best chain.

    The best chain has the largest median throughput in the headline; ratios are taken repeat
    by repeat, so that what slows a whole repeat cancels out.
    """
    repeats = cell["repeats"]
    names = list(dict.fromkeys(name for repeat in repeats for name in repeat["runs"]))
    figures = {
        name: _figures([r["runs"][name] for r in repeats if name in r["runs"]]) for name in names
    }
    best = best_chain(figures)
    ratios = {}
    for name in names:
        if best is not None and name.startswith("tree"):
            ratios[name] = compare(repeats, name, best)
    return {
        "batch_size": cell["batch_size"],
        "temperature": cell["temperature"],
        "round": cell["round"],
        "repeats": len(repeats),
        "configurations": figures,
        "best_chain": best,
        "over_best_chain": ratios,
        "over_plain": {
            name: compare(repeats, name, "plain")
            for name in names
            if name != "plain" and "plain" in names
        },
    }


def best_chain(figures: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The chain of the largest median throughput; None where there is none."""
    chains = {
        name: entry[HEADLINE]["median"]
        for name, entry in figures.items()
        if name.startswith("chain") and entry[HEADLINE]
    }
    return max(chains, key=lambda name: chains[name], default=None)


def compare(repeats: Sequence[Mapping[str, Any]], name: str, other: str) -> dict[str, Any]:
    """Ratios ``name / other`` of every measure, over the repeats that hold both."""
    pairs = [
        (repeat["runs"][name], repeat["runs"][other])
        for repeat in repeats
        if name in repeat["runs"] and other in repeat["runs"]
    ]
    result: dict[str, Any] = {}
    for measure in RATES:
        rates = [(rate(a, measure), rate(b, measure)) for a, b in pairs]
        result[measure] = spread([a / b for a, b in rates if a and b])
    # Of all repeats together: their work over their time.
    totals = [_total([pair[side] for pair in pairs]) for side in (0, 1)]
    result["pooled"] = totals[0] / totals[1] if all(totals) else None
    return result


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Median, quartiles and extremes; None of nothing."""
    if not values:
        return None
    low, high = (
        quantiles(values, n=4, method="inclusive")[::2] if len(values) > 1 else [values[0]] * 2
    )
    return {
        "median": median(values),
        "quartiles": [low, high],
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def _figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rates = {
        measure: spread([value for run in runs if (value := rate(run, measure))])
        for measure in RATES
    }
    waves = [wave for run in runs for wave in run["waves"]]
    forwards = sum(wave["forwards"] for wave in waves)
    decoded = sum(wave["tokens"] - wave["requests"] for wave in waves)
    steps = [
        1000 * sum(w["full_seconds"] for w in run["waves"]) / count
        for run in runs
        if (count := sum(w["full_steps"] for w in run["waves"]))
    ]
    return {
        **rates,
        "tau": decoded / forwards if forwards else None,
        "step_ms": spread(steps),
        "prefill_ms": spread([1000 * wave["prefill_seconds"] for wave in waves]),
        "preemptions": sum(run["counters"]["preemptions"] for run in runs),
    }


def _total(runs: Sequence[Mapping[str, Any]]) -> float:
    tokens, seconds = (
        sum(wave[key] for run in runs for wave in run["waves"]) for key in RATES[HEADLINE]
    )
    return tokens / seconds if seconds else 0.0
