"""What measures are called, in which unit, and which way is better; measures unknown here go by their own name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
