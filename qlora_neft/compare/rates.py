"""A curve of held-out loss over learning rates: which rates to try, and which to choose. NumPy only.

The choice is the minimum of a parabola in log(rate) through the lowest rate tried and its two neighbors. What the curve
cannot tell apart is said with it: the choice's interval ends at rates whose loss is measurably above the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UserInputError

STEP = math.sqrt(10)  # between two rates of the grid: half a decade
ON_EACH_SIDE = 2  # rates of the grid below and above the recipe's own
MOST_ADDED = 3  # beyond an end of the grid, one after another, while the lowest loss is there
DIGITS = 2  # significant ones, of rates that are made here

How = Literal["parabola", "grid", "edge", "kept"]
Bracket = tuple[float | None, float | None]


@dataclass(frozen=True)
class Point:
    """A rate that was tried.

    Attributes:
        rate: The learning rate.
        loss: Mean held-out loss over the seeds, in nats per token; None if a run diverged.
        is_worse: Whether the loss is measurably above the lowest.
    """

    rate: float
    loss: float | None
    is_worse: bool = False


@dataclass(frozen=True)
class Choice:
    """What the curve says.

    Attributes:
        rate: The rate to train with.
        how: ``parabola``; ``grid``, the lowest rate tried, where a neighbor diverged; ``edge``, the lowest rate tried,
            beyond which nothing was tried; ``kept``, the recipe's own, where no rate is measurably worse than another.
        lowest: The rate tried that has the lowest loss.
        interval: The nearest rates below and above ``lowest`` that are measurably worse or diverged: the best lies
            between them if the curve has one valley. None on a side where no such rate was tried.
    """

    rate: float
    how: How
    lowest: float
    interval: Bracket


def text_of(rate: float) -> str:
    """Return a rate as people write it: ``2e-4``, ``1.6e-3``."""
    return np.format_float_scientific(rate, trim="-", exp_digits=1).replace("+", "")


def rounded(rate: float) -> float:
    """Return a rate of `DIGITS` significant digits."""
    return float(f"{rate:.{DIGITS - 1}e}")


def grid(rate: float) -> list[float]:
    """Return the rates to begin with: half decades around the recipe's own, which stays as it is."""
    return [rate if step == 0 else rounded(rate * STEP**step) for step in range(-ON_EACH_SIDE, ON_EACH_SIDE + 1)]


def rates_of(text: str) -> list[float]:
    """Read ``--rates``.

    Returns:
        The rates in ascending order.

    Raises:
        UserInputError: If they are not two or more different positive numbers.
    """
    words = [word.strip() for word in text.split(",")]
    found: list[float] = []
    wrong: list[str] = []
    for word in words:
        try:
            rate = float(word)
        except ValueError:
            rate = math.nan
        if math.isfinite(rate) and rate > 0:
            found.append(rate)
        else:
            wrong.append(repr(word))
    if wrong:
        raise UserInputError(
            f"--rates: must be positive numbers separated by commas, such as 1e-5,1e-4,1e-3, got {', '.join(wrong)}."
        )
    twice = sorted({text_of(rate) for rate in found if found.count(rate) > 1})
    if twice:
        raise UserInputError(f"--rates: {', '.join(twice)} is named twice. Name each rate once.")
    if len(found) < 2:
        raise UserInputError(f"--rates: one rate is no search, got {text!r}. Name two or more, or omit --rates.")
    return sorted(found)


def beyond(points: Sequence[Point], begun_with: Sequence[float]) -> float | None:
    """Return the rate to try next, beyond the end at which the lowest loss is; None if the curve turns, or diverges.

    Args:
        points: The curve so far.
        begun_with: The rates of the grid.
    """
    curve = _sorted(points)
    place = _lowest(curve)
    if place is None:  # all diverged: only lower rates can help
        side = -1
    elif 0 < place < len(curve) - 1:
        return None
    else:
        side = 1 if place else -1
    added = [p for p in curve if (p.rate > max(begun_with) if side > 0 else p.rate < min(begun_with))]
    if len(added) >= MOST_ADDED:
        return None
    return rounded(curve[-1].rate * STEP if side > 0 else curve[0].rate / STEP)


def choose(points: Sequence[Point], own: float) -> Choice | None:
    """Choose a rate.

    Args:
        points: The curve, at least two points.
        own: The recipe's rate.

    Returns:
        None if every rate diverged.
    """
    curve = _sorted(points)
    place = _lowest(curve)
    if place is None:
        return None
    lowest, interval = curve[place].rate, _bracket(curve, place)
    if interval == (None, None) and any(point.rate == own for point in curve):
        return Choice(own, "kept", lowest, interval)
    if place in (0, len(curve) - 1):
        return Choice(lowest, "edge", lowest, interval)
    neighbors = curve[place - 1 : place + 2]
    losses = [point.loss for point in neighbors if point.loss is not None]
    if len(losses) < 3:  # no parabola through a rate that diverged
        return Choice(lowest, "grid", lowest, interval)
    return Choice(rounded(_vertex([point.rate for point in neighbors], losses)), "parabola", lowest, interval)


def _sorted(points: Sequence[Point]) -> list[Point]:
    return sorted(points, key=lambda point: point.rate)


def _lowest(curve: Sequence[Point]) -> int | None:
    """Return the place of the lowest loss, of two alike the lower rate; None if there is no loss."""
    found = [(point.loss, place) for place, point in enumerate(curve) if point.loss is not None]
    return min(found)[1] if found else None


def _bracket(curve: Sequence[Point], place: int) -> Bracket:
    """Return the nearest rates on both sides of a point that are ruled out."""

    def nearest(points: Sequence[Point]) -> float | None:
        return next((point.rate for point in points if point.loss is None or point.is_worse), None)

    return nearest(curve[:place][::-1]), nearest(curve[place + 1 :])


def _vertex(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return where the parabola in log(rate) through three points, the middle one the lowest, has its minimum."""
    a, b, c = np.log(rates)
    fall, rise = losses[0] - losses[1], losses[2] - losses[1]  # neither is negative
    if fall + rise == 0:
        return rates[1]
    # Newton's form, with b as the origin: exact for any spacing, and without large numbers that cancel.
    left, right = b - a, c - b
    vertex = (fall * right**2 - rise * left**2) / (2 * (fall * right + rise * left))
    return math.exp(b + float(vertex))
