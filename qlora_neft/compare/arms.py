"""Runs that differ in their seed alone are an arm; arms are compared pair by pair, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .records import RunRecord
from .statistics import CONFIDENCE, Difference, difference

ALPHA, SEED = "neftune.noise_alpha", "train.seed"


@dataclass(frozen=True)
class Arm:
    """Runs of the same settings.

    Attributes:
        settings: What tells this arm from the others, ``section.key`` to value.
        runs: By seed.
    """

    settings: dict[str, Any]
    runs: tuple[RunRecord, ...]

    @property
    def label(self) -> str:
        """Its settings, each key without its section; of an arm without noise not what kind of noise it has not."""
        told = self.settings
        if ALPHA in told and is_without_noise(self):
            told = {key: value for key, value in told.items() if key == ALPHA or not key.startswith("neftune.")}
        return ", ".join(f"{key.split('.')[-1]} {show(value)}" for key, value in told.items()) or "all runs"

    def values(self, measure: str) -> dict[int, float]:
        """A measure by seed, of the runs that have it."""
        return {run.seed: run.values[measure] for run in self.runs if measure in run.values}


def show(value: Any) -> str:
    """A recipe's value in few characters."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return str(value)


def differing(runs: Sequence[RunRecord]) -> list[str]:
    """Keys of the recipe in which the runs are not all equal; what kind of noise is asked of runs with noise alone."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for found in settings for key in found)
    noisy = [found for found in settings if "neftune.distribution" in found]
    return [key for key in keys if _differs(key, noisy if key.startswith("neftune.") and key != ALPHA else settings)]


def _differs(key: str, settings: Sequence[dict[str, Any]]) -> bool:
    return len({repr(found.get(key)) for found in settings}) > 1


def arms_by(runs: Sequence[RunRecord], keys: Sequence[str]) -> list[Arm]:
    """Group runs by some keys of their recipes, in the order in which each group appears."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(repr([run.settings.get(key) for key in keys]), []).append(run)
    return [
        Arm({key: group[0].settings.get(key) for key in keys}, tuple(sorted(group, key=lambda run: run.seed)))
        for group in groups.values()
    ]


def arms_of(runs: Sequence[RunRecord]) -> list[Arm]:
    """Group runs by all that is learned but the seed."""
    keys = [key for key in differing(runs) if key != SEED and not key.startswith("machine.")]
    return arms_by(runs, keys)


def baseline_of(arm: Arm, arms: Sequence[Arm], *, first: bool = False) -> Arm | None:
    """The arm to compare with: without noise and otherwise the same.

    Args:
        arm: To be compared.
        arms: All.
        first: Whether, where no arm is that, the first of them is the baseline.

    Returns:
        None for the baseline itself, and where there is none.
    """
    if ALPHA in arm.settings:
        others = {key: value for key, value in arm.settings.items() if not key.startswith("neftune.")}
        for candidate in arms:
            rest = {key: value for key, value in candidate.settings.items() if not key.startswith("neftune.")}
            if rest == others and is_without_noise(candidate):
                return None if candidate is arm else candidate
    return arms[0] if first and arm is not arms[0] else None


def is_without_noise(arm: Arm) -> bool:
    """Whether its runs add no noise at any step."""
    settings = arm.runs[0].settings
    return not settings[ALPHA] and not settings.get("neftune.final_alpha")


def compare(arm: Arm, other: Arm, measure: str, confidence: float = CONFIDENCE) -> Difference | None:
    """``arm`` minus ``other``, over the seeds that both have; None without one."""
    mine, its = arm.values(measure), other.values(measure)
    pairs = [mine[seed] - its[seed] for seed in mine if seed in its]
    return difference(pairs, confidence) if pairs else None


def pairing(arm: Arm, other: Arm) -> dict[str, bool]:
    """What the pairs of two arms really share: ``data``, ``base``, and the clean loss before training (``start``)."""
    its = {run.seed: run for run in other.runs}
    pairs = [(run, its[run.seed]) for run in arm.runs if run.seed in its]
    return {
        "data": all(_same(a.about.data_sha256, b.about.data_sha256) for a, b in pairs),
        "base": all(_same(a.about.base_sha256, b.about.base_sha256) for a, b in pairs),
        "start": all(_same(_start(a), _start(b)) for a, b in pairs),
    }


def _start(run: RunRecord) -> float | None:
    return run.about.before.clean_train_loss if run.about.before else None


def _same(a: str | float | None, b: str | float | None) -> bool:
    return a is not None and a == b


@dataclass(frozen=True)
class MeasureName:
    """A measure as tables and pictures show it.

    Attributes:
        key: Its name in ``results.json``.
        label: For people.
        unit: Empty for a count or a share.
        better: Which way is better, None where that depends.
        form: How a value is written.
    """

    key: str
    label: str
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    form: str = ".4g"

    def show(self, value: float | None) -> str:
        """A value, or a dash for none."""
        return "-" if value is None else f"{value:{self.form}}"

    def show_difference(self, value: float) -> str:
        """A signed difference."""
        return f"{value:+{self.form}}"

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


_LOSS = "nats per token"
_KNOWN = (
    MeasureName("clean_train_loss", "clean train loss", _LOSS, None, ".3f"),
    MeasureName("held_out_loss", "held-out loss", _LOSS, "lower", ".3f"),
    MeasureName("lowest_held_out_loss", "lowest held-out loss", _LOSS, "lower", ".3f"),
    MeasureName("exact_match", "exact answers, held out", "", "higher", ".1%"),
)
KNOWN = {name.key: name for name in _KNOWN}


def name_of(key: str) -> MeasureName:
    """How a measure is shown."""
    if key in KNOWN:
        return KNOWN[key]
    measure, _, name = key.rpartition(".")
    label = f"{measure}: {name}" if measure and measure != name.split("_")[-1] else name
    if "loss" in (measure, name.split("_")[-1]):
        return MeasureName(key, label.replace("_", " "), _LOSS, None, ".3f")
    return MeasureName(key, label.replace("_", " "))


def in_order(keys: set[str]) -> list[str]:
    """Known measures first, in their order; the others by name."""
    return [key for key in KNOWN if key in keys] + sorted(keys - KNOWN.keys())
