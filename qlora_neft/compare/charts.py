"""Curves of logged losses as places in an SVG picture: one chart per loss, one line per run, in its arm's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .arms import Arm
from .records import RunRecord

WIDTH, HEIGHT = 420, 270  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 12, 42  # margins around the curves
PICTURE = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
NUM_COLORS, DASHES = 7, ("", "7 4", "2 3")
MAX_POINTS, MAX_MARKS = 300, 40  # of a curve; with more points it is drawn without marks
CURVES = (
    ("clean_loss", "clean train loss", "no noise, no dropout"),
    ("eval_loss", "held-out loss", "no noise, no dropout"),
    ("loss", "train loss", "under noise and dropout"),
)

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Style:
    """How an arm is drawn.

    Attributes:
        color: Number of its color in the style sheet.
        dash: SVG's ``stroke-dasharray``, empty for a solid line.
    """

    color: int
    dash: str


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        style: Its arm's.
        path: ``x,y`` pairs, as SVG takes them.
        marks: Places where it was measured; empty if they are too many to show.
        name: The run's.
    """

    style: Style
    path: str
    marks: tuple[tuple[float, float], ...]
    name: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis and the number written there."""

    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A picture of curves; all places are in SVG units."""

    title: str
    remark: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def style_of(index: int) -> Style:
    """Return an arm's style by its number; colors repeat with other dashes."""
    return Style(index % NUM_COLORS, DASHES[index // NUM_COLORS % len(DASHES)])


def charts(arms: Sequence[Arm]) -> list[Chart]:
    """Return one chart for each loss that any run logged, one curve per run in its arm's style."""
    found = [_chart(arms, *curve) for curve in CURVES]
    return [chart for chart in found if chart is not None]


def curve_of(run: RunRecord, key: str) -> Points:
    """Return steps and finite values of a logged quantity."""
    points = {entry["step"]: entry[key] for entry in run.metrics if entry.get(key) is not None}
    return [(float(step), float(value)) for step, value in sorted(points.items()) if math.isfinite(value)]


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """Reduce a curve to at most ``most`` points by averaging neighbors; the first and the last stay as they are."""
    if len(points) <= most:
        return points
    inner, size = points[1:-1], math.ceil((len(points) - 2) / (most - 2))
    groups = [inner[i : i + size] for i in range(0, len(inner), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [points[0], *means, points[-1]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    rough = (high - low) / count or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _chart(arms: Sequence[Arm], key: str, title: str, remark: str) -> Chart | None:
    curves = [(i, run, curve_of(run, key)) for i, arm in enumerate(arms) for run in arm.runs]
    curves = [(i, run, points) for i, run, points in curves if points]
    if not curves:
        return None
    xs = [x for _, _, points in curves for x, _ in points]
    ys = [y for _, _, points in curves for _, y in points]
    x_range, y_range = (min(0.0, *xs), max(xs)), _padded(min(ys), max(ys))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + _share(point[0], x_range) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - _share(point[1], y_range) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    lines = tuple(_line(style_of(i), run, [place(point) for point in thinned(points)]) for i, run, points in curves)
    x_ticks = tuple(Tick(place((x, y_range[0]))[0], f"{x:g}") for x in ticks(*x_range))
    y_ticks = tuple(Tick(place((0.0, y))[1], f"{y:.4g}") for y in ticks(*y_range))
    return Chart(title, remark, lines, x_ticks, y_ticks)


def _line(style: Style, run: RunRecord, places: Points) -> Line:
    path = " ".join(f"{x},{y}" for x, y in places)
    return Line(style, path, tuple(places) if len(places) <= MAX_MARKS else (), run.name)


def _share(value: float, span: tuple[float, float]) -> float:
    low, high = span
    return (value - low) / (high - low) if high > low else 0.5


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return low - pad, high + pad
