"""Tables and sentences from the results of `results_of`, for a terminal, Markdown and a page. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..display.tables import Table
from .alike import made_text
from .results_file import ArmMeasure, PairedDifference, Results

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
    MeasureName("alpaca.alpaca_win_rate", "win rate", "%", "higher", ".2f"),
    MeasureName("alpaca.alpaca_length_controlled_win_rate", "length-controlled win rate", "%", "higher", ".2f"),
)
KNOWN = {name.key: name for name in _KNOWN}


def name_of(key: str) -> MeasureName:
    """Return how a measure is shown; one that is not known gets a label from its key.

    Args:
        key: As in ``results.json``: of a measure made in several ways, with the difference in parentheses.
    """
    plain, _, difference = key.partition(" (")
    if difference:
        name = name_of(plain)
        return replace(name, key=key, label=f"{name.label} ({difference}")
    if key in KNOWN:
        return KNOWN[key]
    measure, _, name = key.rpartition(".")
    # "loss.whole_train_loss" goes by its name alone, which says "loss" already.
    label = f"{measure}: {name}" if measure and measure != name.split("_")[-1] else name
    if "loss" in (measure, name.split("_")[-1]):
        # Of other data less is better; of the training rows it may mean that they were learned by heart.
        better = None if name == "whole_train_loss" else "lower"
        return MeasureName(key, label.replace("_", " "), _LOSS, better, ".3f")
    return MeasureName(key, label.replace("_", " "), better="higher" if measure == "harness" else None)


def in_order(keys: set[str]) -> list[str]:
    """Sort measures: the known ones first, in their order, then the others by name."""
    return [key for key in KNOWN if key in keys] + sorted(keys - KNOWN.keys())


# What "measurable" reads as, in full and in a narrow table.
SAYS = {True: "measurable", False: "not measurable", None: "one seed"}
SHORT = {True: "yes", False: "no", None: "one seed"}


def measures_table(results: Results) -> Table:
    """Return mean and range over seeds of every measure, one row per arm."""
    keys = list(results["measures"])
    rows = []
    for i, arm in enumerate(results["arms"]):
        found = [results["measures"][key]["arms"][i] for key in keys]
        # Not every run has every measure: the most that any column is a mean of.
        num_runs = str(max((len(row["values"]) for row in found), default=0))
        rows.append((arm["label"], num_runs, *(_spread_text(name_of(k), r) for k, r in zip(keys, found, strict=True))))
    return Table(("", "runs", *(name_of(k).title for k in keys)), rows, "Measures, mean [range over seeds]")


def differences_table(results: Results) -> Table | None:
    """Return every paired difference with its intervals; None without a baseline."""
    rows: list[tuple[str, ...]] = []
    for key, measure in results["measures"].items():
        name = name_of(key)
        for arm in measure["arms"]:
            if "difference" in arm:
                rows.append((name.label, arm["arm"], arm["difference"]["to"], *_difference(name, arm["difference"])))
    columns: tuple[str, ...] = ("measure", "", "against", "difference", "t interval", "bootstrap", "over rows", "")
    # Columns that say the same in every row are dropped; the later one first, so that indices stay valid.
    if not any(row[6] != "-" for row in rows):
        columns, rows = _without(columns, 6), [_without(row, 6) for row in rows]
    title, others = "Paired differences", {row[2] for row in rows}
    if len(others) == 1:
        title += f" to {others.pop()}"
        columns, rows = _without(columns, 2), [_without(row, 2) for row in rows]
    return Table(columns, rows, f"{title}, 95% intervals") if rows else None


def short_table(results: Results) -> Table:
    """Return a narrow table: every measure of every arm, and its difference with Student's interval."""
    # A heading per measure, its arms indented below: no column repeats itself.
    rows: list[tuple[str, ...]] = []
    for key, measure in results["measures"].items():
        name = name_of(key)
        rows.append((name.label, "", "", ""))
        for arm in measure["arms"]:
            found = arm.get("difference")
            change = f"{name.show_difference(found['mean'])} {_interval(name, found['t_interval'])}" if found else ""
            rows.append(
                (f"  {arm['arm']}", _spread_text(name, arm), change, SHORT[found["measurable"]] if found else "")
            )
    return Table(("", "mean [range]", "difference [95%]", "measurable"), rows)


def verdict_lines(results: Results) -> list[str]:
    """Return one sentence on each measure, and one on the best arm."""
    said = [f"{name_of(key).label}: {m['verdict']}" for key, m in results["measures"].items() if m["verdict"]]
    return [*said, *apart_lines(results), results["best"]["sentence"]]


def made_table(results: Results) -> Table | None:
    """Return how the measures of finished runs were made, those made alike in one row; None if there are none."""
    rows: dict[str, list[str]] = {}
    for key, measure in results["measures"].items():
        if "." in key:  # a run's own summary is made in one way
            rows.setdefault(made_text(measure["made"]), []).append(name_of(key).label)
    found = [("; ".join(labels), made) for made, labels in rows.items()]
    return Table(("measures", "made with"), found, "How the measures were made") if found else None


def apart_lines(results: Results) -> list[str]:
    """Say of each measure that was made in several ways that it is, and that they are not compared."""
    ways: dict[str, list[str]] = {}
    for key in results["measures"]:
        plain, _, difference = key.partition(" (")
        ways.setdefault(plain, []).extend([difference.removesuffix(")")] if difference else [])
    return [
        f"{name_of(key).label}: made in {len(found)} ways, which are not compared: {'; '.join(found)}"
        for key, found in ways.items()
        if found
    ]


def pairing_line(results: Results) -> str:
    """Say what the runs of a pair share, as found in their own records."""
    if not results["pairing"]:
        return ""
    words: dict[Literal["data", "base", "start"], str] = {
        "data": "training rows",
        "base": "base weights",
        "start": "loss before training",
    }
    shared = [word for key, word in words.items() if all(pair[key] for pair in results["pairing"])]
    other = [word for word in words.values() if word not in shared]
    line = "Pairs share the seed" + "".join(f", {word}" for word in shared) + " (checked in their records)."
    return line + (f" Not shared: {', '.join(other)}." if other else "")


def _difference(name: MeasureName, found: PairedDifference) -> tuple[str, ...]:
    intervals = (found["t_interval"], found["bootstrap_interval"], found.get("rows_interval"))
    texts = (_interval(name, interval) for interval in intervals)
    return (name.show_difference(found["mean"]), *texts, SAYS[found["measurable"]])


def _interval(name: MeasureName, interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"[{', '.join(name.show_difference(end) for end in interval)}]"


def _spread_text(name: MeasureName, row: ArmMeasure) -> str:
    if len(row["values"]) < 2:
        return name.show(row["mean"])
    return f"{name.show(row['mean'])} [{name.show(row['min'])}, {name.show(row['max'])}]"


def _without(row: tuple[str, ...], i: int) -> tuple[str, ...]:
    return (*row[:i], *row[i + 1 :])
