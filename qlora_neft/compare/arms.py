"""Runs that differ only in their seed are an arm; arms are compared pair by pair, seed by seed. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .alike import Kind
from .records import RunRecord, read_row_losses
from .results_file import Shared
from .statistics import CONFIDENCE, Difference, Interval, difference, ratio_bootstrap_interval

NOISE, ALPHA, SEED = "neftune.", "neftune.noise_alpha", "train.seed"


@dataclass(frozen=True)
class Arm:
    """Runs with the same settings.

    Attributes:
        settings: The keys that tell this arm from the others, ``section.key`` to value.
        runs: In the order of their seeds.
    """

    settings: dict[str, Any]
    runs: tuple[RunRecord, ...]

    @property
    def label(self) -> str:
        """The arm's settings, each key without its section; without noise, the kind of noise is left out."""
        told = self.settings
        if ALPHA in told and is_without_noise(self):  # "alpha 0, gaussian" would speak of noise that is not there
            told = {key: value for key, value in told.items() if key == ALPHA or not key.startswith(NOISE)}
        return ", ".join(f"{key.split('.')[-1]} {show(value)}" for key, value in told.items()) or "all runs"

    def values(self, measure: str | Kind) -> dict[int, float]:
        """Return a measure by seed, for the runs that have it; of a `Kind`, for those that made it so."""
        if isinstance(measure, Kind):
            return {run.seed: run.values[measure.key] for run in self.runs if _has(run, measure)}
        return {run.seed: run.values[measure] for run in self.runs if measure in run.values}


def show(value: Any) -> str:
    """Return a recipe's value in few characters."""
    if isinstance(value, bool) or value is None:  # before numbers, since a bool is one; as YAML writes them
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return str(value)


def differing(runs: Sequence[RunRecord]) -> list[str]:
    """Return the recipe keys in which runs differ; the kind of noise is compared only among runs with noise."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for found in settings for key in found)
    # A run without noise has no distribution; against one with noise it would differ in a key that says nothing.
    noisy = [found for found in settings if "neftune.distribution" in found]
    return [key for key in keys if _differs(key, noisy if key.startswith(NOISE) and key != ALPHA else settings)]


def _has(run: RunRecord, kind: Kind) -> bool:
    return kind.key in run.values and kind.is_of(run)


def _differs(key: str, settings: Sequence[dict[str, Any]]) -> bool:
    # By repr: lists are not hashable, and 1 and True are equal.
    return len({repr(found.get(key)) for found in settings}) > 1


def arms_by(runs: Sequence[RunRecord], keys: Sequence[str]) -> list[Arm]:
    """Group runs by some keys of their recipes, in the order in which each group appears."""
    # Keys by repr, as in _differs.
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(repr([run.settings.get(key) for key in keys]), []).append(run)
    return [
        Arm({key: group[0].settings.get(key) for key in keys}, tuple(sorted(group, key=lambda run: run.seed)))
        for group in groups.values()
    ]


def arms_of(runs: Sequence[RunRecord]) -> list[Arm]:
    """Group runs by everything that decides what is learned, except the seed."""
    # The machine section changes how a run is computed, not what is learned.
    keys = [key for key in differing(runs) if key != SEED and not key.startswith("machine.")]
    return arms_by(runs, keys)


def baseline_of(arm: Arm, arms: Sequence[Arm], *, first: bool = False) -> Arm | None:
    """Return the arm to compare with: without noise and otherwise the same.

    Args:
        arm: The arm to be compared.
        arms: All arms.
        first: If there is no such arm, take the first one as the baseline.

    Returns:
        None for the baseline itself, and if there is none.
    """
    if ALPHA in arm.settings:
        # The same settings but for the noise: the difference is then the noise's alone.
        others = {key: value for key, value in arm.settings.items() if not key.startswith(NOISE)}
        for candidate in arms:
            rest = {key: value for key, value in candidate.settings.items() if not key.startswith(NOISE)}
            if rest == others and is_without_noise(candidate):
                return None if candidate is arm else candidate
    # Not all sweeps are about noise: a sweep of learning rates is compared with its first.
    return arms[0] if first and arm is not arms[0] else None


def is_without_noise(arm: Arm) -> bool:
    """Whether an arm's runs add no noise at any step."""
    settings = arm.runs[0].settings
    return not settings[ALPHA] and not settings.get("neftune.final_alpha")


def compare(arm: Arm, other: Arm, measure: str | Kind, confidence: float = CONFIDENCE) -> Difference | None:
    """Return ``arm`` minus ``other`` over the seeds that both have; None if they share none."""
    mine, its = arm.values(measure), other.values(measure)
    # One seed draws data order, dropout and initial weights of both runs: pairing takes that variance out.
    pairs = [mine[seed] - its[seed] for seed in mine if seed in its]
    return difference(pairs, confidence) if pairs else None


def rows_interval(arm: Arm, other: Arm, confidence: float = CONFIDENCE) -> Interval | None:
    """Bootstrap over held-out rows the difference of held-out losses, ``arm`` minus ``other``.

    It says how far other rows of the same kind could move the difference between *these* trained models. It knows
    nothing of how other seeds would have trained them.

    Returns:
        None if the runs have no losses by row, or not of the same rows.
    """
    pairs = [(read_row_losses(a.folder), read_row_losses(b.folder)) for a, b in _pairs(arm, other)]
    found = [(a, b) for a, b in pairs if a is not None and b is not None and a.rows == b.rows]
    # All pairs or none: an interval over some of the seeds would not belong to the mean beside it.
    if not pairs or len(found) < len(pairs) or len({a.rows for a, _ in found}) > 1:
        return None
    counts = np.asarray(found[0][0].counts)  # (N,), the same in every run, as the rows' hashes are equal
    if len(counts) < 2:
        return None
    sums = np.mean([np.subtract(a.sums, b.sums) for a, b in found], axis=0)  # (N,), averaged over seeds
    return ratio_bootstrap_interval(sums, counts, confidence)


def pairing(arm: Arm, other: Arm) -> Shared:
    """Check what the pairs of two arms share: ``data``, ``base``, and the clean loss before training (``start``)."""
    pairs = _pairs(arm, other)
    return {
        "data": all(_same(a.about.data_sha256, b.about.data_sha256) for a, b in pairs),
        "base": all(_same(a.about.base_sha256, b.about.base_sha256) for a, b in pairs),
        "start": all(_same(_start(a), _start(b)) for a, b in pairs),
    }


def _pairs(arm: Arm, other: Arm) -> list[tuple[RunRecord, RunRecord]]:
    its = {run.seed: run for run in other.runs}
    return [(run, its[run.seed]) for run in arm.runs if run.seed in its]


def _start(run: RunRecord) -> float | None:
    return run.about.before.clean_train_loss if run.about.before else None


def _same(a: str | float | None, b: str | float | None) -> bool:
    return a is not None and a == b  # two runs without a record are not known to share anything
