"""Means of paired differences and their uncertainty. NumPy only.

There are two intervals, because each has a weakness with the three to five seeds that people can afford. The percentile
bootstrap assumes no distribution, but with three seeds its ends are the smallest and the largest difference, so three
equal signs, which occur by chance one time in four, already keep it off zero. Student's t interval accounts for how few
seeds there are, but assumes normally distributed differences. A difference is called measurable if both exclude zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
SEED = 0  # fixed, so that the same runs always give the same interval
CONFIDENCE = 0.95

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """The mean of some paired differences.

    Attributes:
        values: One difference per pair, finite.
        mean: Their mean.
        t_interval: Student's t, None for a single pair.
        bootstrap: Percentile bootstrap over pairs, None for a single pair.
    """

    values: tuple[float, ...]
    mean: float
    t_interval: Interval | None
    bootstrap: Interval | None

    @property
    def is_measurable(self) -> bool | None:
        """Whether both intervals exclude zero; None without intervals."""
        if self.t_interval is None or self.bootstrap is None:
            return None
        return leaves_zero_out(self.t_interval) and leaves_zero_out(self.bootstrap)


def difference(values: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Describe paired differences.

    Args:
        values: One per pair, at least one, all finite.
        confidence: Confidence of the intervals, in (0, 1).
    """
    values = tuple(float(value) for value in values)
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Difference(values, mean, None, None)
    return Difference(values, mean, t_interval(values, confidence), bootstrap_interval(values, confidence))


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return Student's interval for the mean of two or more values."""
    # ddof=1: the standard deviation is estimated from the same few values as the mean.
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = t_quantile(0.5 + confidence / 2, len(values) - 1) * error
    return mean - half, mean + half


def bootstrap_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return a percentile bootstrap interval for the mean: `RESAMPLES` draws of whole pairs, with a fixed seed."""
    # (RESAMPLES, n): pairs are few, so all draws fit at once.
    drawn = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.asarray(values, dtype=float)[drawn].mean(axis=1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def ratio_bootstrap_interval(sums: np.ndarray, counts: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """Return a percentile bootstrap interval over rows for a difference of losses per token.

    Args:
        sums: Differences of the rows' summed losses, (N,), in nats.
        counts: The rows' trained tokens, (N,), at least one in all.
        confidence: Confidence of the interval.

    Returns:
        Interval of sum(sums) / sum(counts), with rows drawn with replacement.
    """
    generator, num_rows = np.random.default_rng(SEED), len(sums)
    # One resample at a time, so that memory does not grow with RESAMPLES x N.
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = generator.integers(num_rows, size=num_rows)
        # A draw of rows without a single trained token has no loss: 0, instead of a division by zero.
        means[i] = sums[drawn].sum() / max(counts[drawn].sum(), 1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution.

    Args:
        probability: In [0.5, 1).
        degrees: Degrees of freedom, at least 1.
    """
    # By bisection of the distribution below: NumPy has no t quantile, and SciPy would be a dependency for one number.
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        high *= 2
    for _ in range(200):  # far beyond the 60 or so that float64 can tell apart
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
    return high


def t_probability(t: float, degrees: int) -> float:
    """Return Student's cumulative distribution at ``t`` >= 0, a finite sum for whole degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = degrees % 2  # 26.7.3 is for odd degrees, 26.7.4 for even ones
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(degrees // 2):
        total += term
        term *= cosine**2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    inside = (theta + sine * total) * 2 / math.pi if odd else sine * total
    return (1 + inside) / 2


def leaves_zero_out(interval: Interval) -> bool:
    """Whether an interval lies entirely on one side of zero."""
    low, high = interval
    return low > 0 or high < 0
