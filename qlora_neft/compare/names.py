"""Measures as tables and pictures show them: label, unit, and how their values are written. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_LOSS = "nats per token"


@dataclass(frozen=True)
class MeasureName:
    """How a measure is shown.

    Attributes:
        key: Its name in ``results.json``.
        label: Its name for people.
        unit: Empty for a count or a share.
        better: Which direction is better, None if that depends.
        form: Format specification of its values.
    """

    key: str
    label: str
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    form: str = ".4g"

    def show(self, value: float | None) -> str:
        """Return a value as text, a dash for None."""
        return "-" if value is None else f"{value:{self.form}}"

    def show_difference(self, value: float) -> str:
        """Return a signed difference as text."""
        return f"{value:+{self.form}}"

    @property
    def title(self) -> str:
        """Label and unit, for a heading."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


_KNOWN = (
    MeasureName("clean_train_loss", "clean train loss", _LOSS, None, ".3f"),
    MeasureName("held_out_loss", "held-out loss", _LOSS, "lower", ".3f"),
    MeasureName("lowest_held_out_loss", "lowest held-out loss", _LOSS, "lower", ".3f"),
    MeasureName("exact_match", "exact answers, held out", "", "higher", ".1%"),
)
KNOWN = {name.key: name for name in _KNOWN}


def name_of(key: str) -> MeasureName:
    """Return how a measure is shown; one that is not known gets a label from its key."""
    if key in KNOWN:
        return KNOWN[key]
    measure, _, name = key.rpartition(".")
    label = f"{measure}: {name}" if measure and measure != name.split("_")[-1] else name
    if "loss" in (measure, name.split("_")[-1]):
        return MeasureName(key, label.replace("_", " "), _LOSS, None, ".3f")
    return MeasureName(key, label.replace("_", " "))


def in_order(keys: set[str]) -> list[str]:
    """Sort measures: the known ones first, in their order, then the others by name."""
    return [key for key in KNOWN if key in keys] + sorted(keys - KNOWN.keys())
