"""The picture of a sweep, ``sweep.png``: values and paired differences of its measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..display.plots import (
    BLUE,
    DARK_GREY,
    GREEN,
    LIGHT_GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    new_picture,
    save_picture,
)
from .arms import Arm, show
from .names import name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_MEASURES = 5  # that fit beside each other
NOT_DRAWN = {"lowest_held_out_loss"}  # the curves of `report` show it better
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, DARK_GREY)
MARKERS = "osD^vPX"


def plot_sweep(arms: Sequence[Arm], results: dict[str, Any], path: Path, title: str) -> bool:
    """Draw the seeds of each arm as points with mean and range, and differences to the baseline with their t interval.

    Args:
        arms: In the order of ``results``.
        results: From `results_of`.
        path: The PNG file.
        title: Heading.

    Returns:
        False if there is nothing to draw, or matplotlib is not installed (extra ``plots``).
    """
    keys = [key for key in results["measures"] if key not in NOT_DRAWN][:MAX_MEASURES]
    drawing = new_picture("", (max(4.2 * len(keys), 6), 6.4)) if keys else None
    if drawing is None:
        return False
    figure, axes = drawing
    axes.remove()
    figure.suptitle(title, parse_math=False)
    panels = figure.subplots(2, len(keys), squeeze=False)
    key, lines = _lines(arms)
    for column, name in enumerate(keys):
        measure = results["measures"][name]
        _values(panels[0][column], lines, measure, key is not None)
        _differences(panels[1][column], lines, measure)
        panels[0][column].set_title(name_of(name).title, fontsize=10)
    panels[0][0].set_ylabel("value: seeds, mean, range")
    panels[1][0].set_ylabel("difference to the baseline\nmean, 95% t interval")
    for panel in panels.flat:
        _finish(panel, key, arms)
    if len(lines) > 1:
        panels[0][0].legend(frameon=False, fontsize=8)
    return save_picture(figure, path)


def _lines(arms: Sequence[Arm]) -> tuple[str | None, dict[str, list[tuple[float, int]]]]:
    """Return the numeric key for the x axis, None to give each arm a place; and by line, its arms' places and indices.

    Arms that differ in other keys as well are on different lines.
    """
    key = next(iter(arms[0].settings), None)
    numbers = [arm.settings.get(key) for arm in arms]
    if key is None or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        return None, {"": [(float(i), i) for i in range(len(arms))]}
    lines: dict[str, list[tuple[float, int]]] = {}
    for i, arm in enumerate(arms):
        rest = ", ".join(f"{k.split('.')[-1]} {show(v)}" for k, v in arm.settings.items() if k != key)
        lines.setdefault(rest, []).append((float(arm.settings[key]), i))
    return key, {name: sorted(line) for name, line in lines.items()}


def _values(panel: Axes, lines: dict[str, list[tuple[float, int]]], measure: dict[str, Any], is_numeric: bool) -> None:
    for i, (label, line) in enumerate(lines.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        found = [(x, measure["arms"][arm]) for x, arm in line if measure["arms"][arm]["values"]]
        seeds = [(x, value) for x, row in found for value in row["values"].values()]
        if not found:
            continue
        panel.plot(*zip(*seeds, strict=True), marker, color=color, markersize=4, alpha=0.5, linestyle="none")
        places, means = [x for x, _ in found], [row["mean"] for _, row in found]
        below = [row["mean"] - row["min"] for _, row in found]
        above = [row["max"] - row["mean"] for _, row in found]
        style: dict[str, Any] = {"color": color, "capsize": 3, "linewidth": 1.6, "label": label or None}
        joined = "-" if is_numeric else "none"
        panel.errorbar(places, means, (below, above), marker="_", markersize=12, linestyle=joined, **style)


def _differences(panel: Axes, lines: dict[str, list[tuple[float, int]]], measure: dict[str, Any]) -> None:
    panel.axhline(0, color=LIGHT_GREY, linewidth=1)
    for i, line in enumerate(lines.values()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        found = [(x, measure["arms"][arm]["difference"]) for x, arm in line if "difference" in measure["arms"][arm]]
        for x, row in found:
            panel.plot([x] * len(row["values"]), row["values"], marker, color=color, markersize=4, alpha=0.5)
            low, high = row["t_interval"] or (row["mean"], row["mean"])
            error = ([row["mean"] - low], [high - row["mean"]])
            panel.errorbar([x], [row["mean"]], error, marker="_", markersize=12, color=color, capsize=3, linewidth=1.6)


def _finish(panel: Axes, key: str | None, arms: Sequence[Arm]) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    if key is None:
        labels = [arm.label for arm in arms]
        panel.set_xticks(range(len(labels)), labels, rotation=30, ha="right", parse_math=False, fontsize=8)
        panel.set_xlim(-0.5, len(labels) - 0.5)
        return
    panel.set_xlabel(key)
    places = sorted({float(arm.settings[key]) for arm in arms})
    if places[0] > 0 and places[-1] / places[0] >= 30:
        panel.set_xscale("log")
        panel.set_xlim(places[0] / 1.5, places[-1] * 1.5)
        return
    margin = 0.08 * (places[-1] - places[0]) or 1
    panel.set_xlim(places[0] - margin, places[-1] + margin)
    if len(places) <= 8:
        panel.set_xticks(places, [f"{place:g}" for place in places])
