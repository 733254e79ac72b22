"""The attention benchmark's results as Markdown."""

from typing import Any

from vllm_eagle3.bench.markdown import table

_TITLES = {
    "fa3_causal": "FA3 causal",
    "fa3_finish": "FA3 + tree",
    "portable": "portable",
}


def render(results: dict[str, Any]) -> str:
    """Two tables (verification, drafting), what was left out, and how it was measured."""
    model = results["model"]
    parts = [
        f"Attention of one layer on {results['device']}: {model['heads']}/{model['kv_heads']} heads"
        f" of {model['head_dim']}, {model['dtype']}, pages of {model['page']} tokens. Microseconds"
        f" in CUDA graphs, medians of {results['repeats']}, caches cold in L2; in brackets the"
        " ratio to FlashAttention 3 on a chain. Floor: reading the cache once at"
        f" {results['bandwidth']:g} TB/s."
    ]
    for is_draft, title in (
        (False, "Verification: a tree of N nodes, beside a causal chain of N tokens."),
        (True, "Drafting: N rows of a tree's last level, beside the chain's one row."),
    ):
        cells = [cell for cell in results["cells"] if cell["draft"] == is_draft and "ratio" in cell]
        if cells:
            parts += [title, _table(cells, results)]
    skipped = [cell for cell in results["cells"] if "skipped" in cell]
    if skipped:
        parts.append(
            "Left out: "
            + "; ".join(
                f"{cell['context']} x {cell['batch']} x {cell['rows']}"
                f"{' (draft)' if cell['draft'] else ''}, {cell['skipped']}"
                for cell in skipped
            )
            + "."
        )
    apart = [cell for cell in results["cells"] if not cell.get("agree", True)]
    if apart:
        parts.append(
            "**The sides do not compute the same** in "
            + ", ".join(f"{c['context']} x {c['batch']} x {c['rows']}" for c in apart)
            + "."
        )
    return "\n\n".join(parts) + "\n"


def _table(cells: list[dict[str, Any]], results: dict[str, Any]) -> str:
    names = results["sides"]
    header = ["context", "batch", "N", *(_TITLES[name] for name in names), "floor"]
    rows = []
    for cell in cells:
        figures = []
        for name in names:
            ratio = cell["ratio"].get(name)
            bracket = "" if ratio is None else f" ({ratio:.2f})"
            figures.append(f"{cell['microseconds'][name]:.1f}{bracket}")
        floor = cell["read_bytes"] / results["bandwidth"] / 1e6
        rows.append(
            [*(str(cell[key]) for key in ("context", "batch", "rows")), *figures, f"{floor:.1f}"]
        )
    return table(header, rows)
