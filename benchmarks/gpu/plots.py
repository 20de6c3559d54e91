"""Two pictures of a measurement: speed by arm, and memory against the estimate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import figures
from .figures import Parts
from .lengths import NAMES

GIB = 2**30
SPEED, MEMORY = "gpu_speed.png", "gpu_memory.png"


def write_plots(output: Path, raw: Mapping[str, Any]) -> list[Path]:
    """Write what there is to see; return the files, none without matplotlib or without results."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    parts: Parts = {**raw["parts"], "identity": raw["identity"]}
    written = []
    for name, draw in ((SPEED, _speed), (MEMORY, _memory)):
        figure = Figure(figsize=(8, 4), layout="constrained")
        FigureCanvasAgg(figure)
        if draw(figure, parts):
            figure.savefig(output / name, dpi=120)
            written.append(output / name)
    return written


def _speed(figure: Any, parts: Parts) -> bool:
    """Draw tokens per second of every arm, one panel a distribution; bars of void arms are hatched."""
    arms, wrong = figures.arms_in(parts), figures.void(parts)
    panels = [name for name in NAMES if any(figures.speed(parts, arm, "7b", name) for arm in arms)]
    for index, lengths in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        found = {arm: speed for arm in arms if (speed := figures.speed(parts, arm, "7b", lengths))}
        middles = [speed.median for speed in found.values()]
        gaps = [
            [speed.median - speed.least for speed in found.values()],
            [speed.most - speed.median for speed in found.values()],
        ]
        bars = axes.bar(list(found), middles, yerr=gaps, color="#4c78a8", ecolor="#555555", capsize=3)
        for arm, bar in zip(found, bars, strict=True):
            bar.set_hatch("//" if arm in wrong else "")
        ceiling = figures.ceiling_of(parts, "7b", lengths)
        if ceiling is not None:
            axes.axhline(ceiling, color="#e45756", linestyle="--", label="ceiling")
            axes.legend(loc="upper left", frameon=False)
        axes.set_title(f"7B, {lengths} lengths")
        axes.set_ylabel("trained tokens per second")
        axes.tick_params(axis="x", rotation=30)
    return bool(panels)


def _memory(figure: Any, parts: Parts) -> bool:
    """Draw what our runs took of the card beside the planner's estimate."""
    runs = [part for part in parts.values() if "run" in part and part.get("estimate") and figures.peak(parts, part)]
    if not runs:
        return False
    axes = figure.add_subplot(1, 1, 1)
    names = [f"{run['run']['base']} {run['run']['lengths']}\n{run['run']['arm']}" for run in runs]
    places = range(len(runs))
    axes.bar([at - 0.2 for at in places], [figures.peak(parts, run) / GIB for run in runs], 0.4, label="measured")
    axes.bar([at + 0.2 for at in places], [run["estimate"]["peak"] / GIB for run in runs], 0.4, label="estimate")
    axes.set_xticks(list(places), names, rotation=30, fontsize=7)
    axes.set_ylabel("GiB at the peak")
    axes.legend(frameon=False)
    return True
