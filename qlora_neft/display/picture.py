"""What every PNG of ours has in common: the look, and that matplotlib may be missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_picture(title: str, size: tuple[float, float] = (8, 4.5)) -> tuple[Any, Any] | None:
    """A figure of so many inches and its axes; None if matplotlib is not installed (extra ``plots``)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, parse_math=False)  # a path may hold dollar signs
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_picture(figure: Any, path: Path) -> bool:
    """Write a PNG; true, for callers that say whether there is one."""
    figure.savefig(path, format="png")
    return True
