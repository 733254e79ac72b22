"""The acceptance benchmark's results as Markdown."""

from collections.abc import Iterator, Sequence
from typing import Any

from vllm_eagle3.bench.markdown import failure, table

_TITLES = {"mt_bench": "MT-bench", "humaneval": "HumanEval", "gsm8k": "GSM8K"}
_FAILED = "failed"


def render(results: dict[str, Any]) -> str:
    """Two tables (tau, identity with plain decoding) and every error, ready for a README."""
    configurations = results["configurations"]
    drafting = [entry for entry in configurations if entry["num_speculative_tokens"]]
    cells = [(cell["dataset"], cell["temperature"]) for cell in results["cells"]]
    header = ["configuration", *(f"{title(d)}, T={t:g}" for d, t in cells)]
    parts = [
        *results["notes"],
        "Mean acceptance length tau: tokens for each target forward.",
        table(header, [[label(e), *(_tau(e, *cell) for cell in cells)] for e in drafting]),
    ]
    if any("identity" in cell for entry in configurations for cell in entry["cells"]):
        parts += [
            "Turns with the very tokens of plain decoding, of those compared.",
            table(header, [[label(e), *(_identity(e, *cell) for cell in cells)] for e in drafting]),
        ]
    gap = _largest_gap(drafting)
    if gap is not None:
        parts.append(
            f"At T=0, where outputs part, plain decoding's two best logits differ by {gap:.3g}"
            " at most."
        )
    surplus = [
        counted["vllm_tau"] - counted["tau"]
        for entry in drafting
        for counted in entry["passes"]
        if counted["vllm_tau"] and counted["tau"]
    ]
    if surplus:
        parts.append(
            "vLLM's own mean acceptance length, counted before answers are cut, minus tau:"
            f" {min(surplus):.3f} to {max(surplus):.3f}."
        )
    parts += shortfalls(configurations)
    return "\n\n".join(parts) + "\n"


def shortfalls(configurations: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What each configuration left out, and why."""
    for entry in configurations:
        if entry["skipped"]:
            yield (
                f"`{entry['name']}` skipped {len(entry['skipped'])} turns whose prompts do not fit"
                " into max_model_len."
            )
        if entry["error"]:
            yield failure(entry["name"], entry["error"])


def title(dataset: str) -> str:
    """A data set's name as it is usually written."""
    return _TITLES.get(dataset, dataset)


def label(entry: dict[str, Any]) -> str:
    """A configuration in words."""
    count = entry["num_speculative_tokens"]
    if entry["tree"] is None:
        return f"chain, {count} drafts"
    shape = entry["shape"]
    one_size = "verify_budget" in shape and shape["verify_budget"] is None
    notes = ["fixed size"] if one_size else []
    kind = "static tree"
    if "paths" not in shape:
        kind, notes = "tree", [f"depth {shape['depth']}", f"top-k {shape['top_k']}", *notes]
    return f"{kind}, {count} drafts" + (f" ({', '.join(notes)})" if notes else "")


def _find(entry: dict[str, Any], dataset: str, temperature: float) -> dict[str, Any] | None:
    for cell in entry["cells"]:
        if (cell["dataset"], cell["temperature"]) == (dataset, temperature):
            return cell
    return None


def _tau(entry: dict[str, Any], dataset: str, temperature: float) -> str:
    cell = _find(entry, dataset, temperature)
    if cell is None:
        return _FAILED
    return "-" if cell["tau"] is None else f"{cell['tau']:.2f}"


def _identity(entry: dict[str, Any], dataset: str, temperature: float) -> str:
    cell = _find(entry, dataset, temperature)
    if cell is None:
        return _FAILED
    identity = cell.get("identity")
    return f"{identity['identical']}/{identity['compared']}" if identity else "-"


def _largest_gap(entries: Sequence[dict[str, Any]]) -> float | None:
    return max(
        (
            divergence["gap"]
            for entry in entries
            for cell in entry["cells"]
            if cell["temperature"] == 0
            for divergence in cell.get("identity", {}).get("divergences", ())
            if "gap" in divergence
        ),
        default=None,
    )
