"""What the plots of all benchmarks share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def subplots(columns: int, width: float) -> tuple[Any, Sequence["Axes"]]:
    """A figure and its axes, side by side, each ``width`` inches wide."""
    # Not pyplot, which looks for a display and keeps every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 4.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def engine_title(results: dict[str, Any]) -> str:
    """Device, vLLM's version and dtype, and what must stand with every number."""
    engine = next((e["engine"] for e in results["configurations"] if e["engine"]), {})
    title = f"{engine.get('device', '')}, vLLM {engine.get('vllm', '')}, {engine.get('dtype', '')}"
    return "\n".join([title, *results["notes"]])
