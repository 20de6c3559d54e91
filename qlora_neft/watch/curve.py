"""Losses drawn in characters: dots of braille where the terminal has them, otherwise ASCII."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text

from .run import Loss

MARKS = {"clean": ("x", "blue"), "held_out": ("o", "red")}  # losses measured now and then, each a character
LINE = "bright_black"
# The dots of a braille character from the top down, its left and its right column: bits above U+2800.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
OUTLIERS = 0.02  # share of the noisy losses that may lie outside: one spike must not flatten the rest
DECADE = 10.0  # losses that span more are drawn by their logarithm, or all but the first would lie on the axis


@dataclass(frozen=True)
class _Scale:
    """From steps and losses to dots; the first row is the highest loss."""

    first: float
    last: float
    low: float
    high: float

    @property
    def is_log(self) -> bool:
        return self.low > 0 and self.high / self.low > DECADE

    def column(self, step: float, columns: int) -> int:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.0
        return min(int(share * columns), columns - 1)

    def row(self, loss: float, rows: int) -> int:
        by = (lambda value: math.log(max(value, self.low))) if self.is_log else float
        high, low = by(self.high), by(self.low)
        share = (high - by(loss)) / (high - low) if high > low else 0.5
        return min(max(int(share * rows), 0), rows - 1)


def plot(curves: Mapping[str, Sequence[Loss]], width: int, height: int, *, ascii_only: bool) -> list[Text]:
    """Draw the losses of a run.

    Args:
        curves: By name, as in `run.Snapshot`.
        width: Characters of the whole, labels included.
        height: Lines of the drawing; one more has the steps.
        ascii_only: Whether to draw in ASCII.

    Returns:
        The lines; none with fewer than two points, or without room.
    """
    points = [loss for curve in curves.values() for loss in curve]
    if len({loss.step for loss in points}) < 2 or height < 2:
        return []
    scale = _scale(curves, points)
    labels = {0: f"{scale.high:.2f}", height - 1: f"{scale.low:.2f}"}
    margin = max(map(len, labels.values())) + 1
    columns = width - margin
    if columns < 10:
        return []
    cells = _line(_by_column(curves.get("train", ()), scale, columns * 2), scale, columns, height, ascii_only)
    for name, (mark, style) in MARKS.items():
        for loss in curves.get(name, ()):
            cells[scale.row(loss.value, height)][scale.column(loss.step, columns)] = (mark, style)
    lines = [
        Text(labels.get(row, "").rjust(margin - 1) + " ").append_text(Text.assemble(*line))
        for row, line in enumerate(cells)
    ]
    first, last = f"{scale.first:g}" + "  (log scale)" * scale.is_log, f"step {scale.last:g}"
    room = max(columns - len(first), 0)
    return [*lines, Text(" " * margin + first + last.rjust(room), style=LINE)]


def _scale(curves: Mapping[str, Sequence[Loss]], points: Sequence[Loss]) -> _Scale:
    noisy = sorted(loss.value for loss in curves.get("train", ()))
    left_out = int(len(noisy) * OUTLIERS + 0.5)
    inside = noisy[: len(noisy) - left_out] + [loss.value for name in MARKS for loss in curves.get(name, ())]
    steps = [loss.step for loss in points]
    return _Scale(min(steps), max(steps), min(inside), max(inside))


def _by_column(curve: Sequence[Loss], scale: _Scale, columns: int) -> dict[int, float]:
    """Return the mean loss of each column that has any."""
    found: dict[int, list[float]] = {}
    for loss in curve:
        found.setdefault(scale.column(loss.step, columns), []).append(loss.value)
    return {column: sum(values) / len(values) for column, values in sorted(found.items())}


def _line(
    means: Mapping[int, float], scale: _Scale, columns: int, height: int, ascii_only: bool
) -> list[list[tuple[str, str]]]:
    """Draw the noisy losses, each joined to the one before, in two by four dots a character."""
    dots = [[0] * columns for _ in range(height)]
    earlier: tuple[int, int] | None = None
    for column, mean in means.items():
        row = scale.row(mean, height * 4)
        for x, y in _between(earlier or (column, row), (column, row)):
            dots[y // 4][x // 2] |= DOTS[x % 2][y % 4]
        earlier = column, row
    return [[(_character(bits, ascii_only), LINE) for bits in line] for line in dots]


def _between(a: tuple[int, int], b: tuple[int, int]) -> list[tuple[int, int]]:
    count = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    return [
        (round(a[0] + (b[0] - a[0]) * i / count), round(a[1] + (b[1] - a[1]) * i / count)) for i in range(count + 1)
    ]


def _character(bits: int, ascii_only: bool) -> str:
    if not bits:
        return " "
    return "." if ascii_only else chr(0x2800 + bits)
