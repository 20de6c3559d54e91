"""What came of some arms, as plain values for tables, pictures and ``results.json``; and what may be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_record_if_there
from .arms import KNOWN, Arm, MeasureName, baseline_of, compare, in_order, name_of, pairing
from .statistics import CONFIDENCE, RESAMPLES, Difference, Interval, leaves_zero_out, ratio_bootstrap_interval

ROWS_FILE = "row_losses.json"


def read_rows(folder: Path) -> dict[str, Any] | None:
    """``sums`` (nats), ``counts`` (trained tokens) by held-out row, and ``rows``, their hash; None without them.

    Raises:
        UserInputError: If the file is damaged.
    """
    return read_record_if_there(folder / ROWS_FILE, "Remove it to measure again.")


def rows_interval(arm: Arm, other: Arm, confidence: float = CONFIDENCE) -> Interval | None:
    """Bootstrap over held-out rows of the difference of held-out losses, ``arm`` minus ``other``.

    It says how far other rows of the same kind could move the difference between *these* trained models. It knows
    nothing of how other seeds would have trained them.

    Returns:
        None where the runs have no losses by row, or of other rows.
    """
    its = {run.seed: run for run in other.runs}
    pairs = [(read_rows(run.folder), read_rows(its[run.seed].folder)) for run in arm.runs if run.seed in its]
    if not pairs or any(a is None or b is None or a["rows"] != b["rows"] for a, b in pairs):
        return None
    if len({a["rows"] for a, _ in pairs}) > 1 or len(pairs[0][0]["counts"]) < 2:
        return None
    sums = np.mean([np.subtract(a["sums"], b["sums"]) for a, b in pairs], axis=0)  # (N,)
    return ratio_bootstrap_interval(sums, np.asarray(pairs[0][0]["counts"]), confidence)


DECIDING = "held_out_loss"
METHOD = (
    f"Differences are paired over seeds. Intervals hold {CONFIDENCE:.0%}: Student's t over the seeds, and a percentile "
    f"bootstrap of whole pairs (B = {RESAMPLES:,}, fixed seed). A difference is measurable when both leave zero out. "
    "With three seeds the bootstrap's ends are the smallest and the largest difference. Where the losses of single "
    "held-out rows are known, a bootstrap over rows must leave zero out as well. The best arm is named only if "
    "its held-out loss is measurably below that of every other arm, the confidence raised for the number of "
    "comparisons (Bonferroni)."
)


def results_of(arms: Sequence[Arm], *, first: bool = False) -> dict[str, Any]:
    """Every measure of every arm, differences to the baseline, and a sentence on each.

    Args:
        arms: To compare.
        first: As in `baseline_of`.
    """
    keys = in_order(_telling([run.values for arm in arms for run in arm.runs]))
    return {
        "method": METHOD,
        "arms": [{"label": arm.label, "settings": arm.settings, "runs": [r.name for r in arm.runs]} for arm in arms],
        "pairing": [{"arm": arm.label, "to": base.label, **pairing(arm, base)} for arm, base in _compared(arms, first)],
        "measures": {key: _measure(key, arms, first) for key in keys},
        "best": best(arms),
    }


def _telling(found: Sequence[dict[str, float]]) -> set[str]:
    """Measures to compare: all but counts of several runs (rows, chunk) that are the same everywhere."""
    keys = {key for values in found for key in values}
    return {k for k in keys if k in KNOWN or len(found) == 1 or len({values.get(k) for values in found}) > 1}


def _compared(arms: Sequence[Arm], first: bool) -> list[tuple[Arm, Arm]]:
    found = [(arm, baseline_of(arm, arms, first=first)) for arm in arms]
    return [(arm, base) for arm, base in found if base is not None]


def _measure(key: str, arms: Sequence[Arm], first: bool) -> dict[str, Any]:
    name = name_of(key)
    rows, compared = [], []
    for arm in arms:
        values = arm.values(key)
        row: dict[str, Any] = {"arm": arm.label, "values": values, **_spread(list(values.values()))}
        base = baseline_of(arm, arms, first=first)
        found = compare(arm, base, key) if base else None
        if base and found:
            rows_of = rows_interval(arm, base) if key == DECIDING else None
            row["difference"] = _plain(found, base.label, rows_of)
            compared.append((arm.label, row["difference"]))
        rows.append(row)
    label = {"label": name.label, "unit": name.unit, "better": name.better}
    return {**label, "arms": rows, "verdict": _verdict(compared, name)}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "min": None, "max": None}
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def _plain(found: Difference, to: str, rows_of: Interval | None) -> dict[str, Any]:
    over_rows = {} if rows_of is None else {"rows_interval": rows_of}
    return {
        **over_rows,
        "to": to,
        "values": list(found.values),
        "mean": found.mean,
        "t_interval": found.t_interval,
        "bootstrap_interval": found.bootstrap,
        "measurable": is_measurable(found, rows_of),
    }


def is_measurable(found: Difference, rows_of: Interval | None) -> bool | None:
    """Whether all intervals leave zero out, that over rows as well where there is one; None for a single seed."""
    return found.is_measurable and (rows_of is None or leaves_zero_out(rows_of))


def _verdict(compared: Sequence[tuple[str, dict[str, Any]]], name: MeasureName) -> str:
    """One sentence; empty where there is nothing to compare with."""
    if not compared:
        return ""
    if all(found["measurable"] is None for _, found in compared):
        return "one seed: no difference can be told from chance"
    clear = [f"{label} {name.show_difference(found['mean'])}" for label, found in compared if found["measurable"]]
    unclear = [label for label, found in compared if not found["measurable"]]
    if not clear:
        return "no measurable difference"
    between = "; " if any("," in label for label, _ in compared) else ", "
    rest = f"; no measurable difference: {between.join(unclear)}" if unclear else ""
    return f"measurable: {between.join(clear)}{rest}"


def best(arms: Sequence[Arm], measure: str = DECIDING) -> dict[str, Any]:
    """Which arm has the lowest held-out loss, and whether that can be told from chance.

    Returns:
        ``arm`` (None where it cannot), ``lowest`` (by its mean all the same) and a ``sentence``.
    """
    measured = [arm for arm in arms if arm.values(measure)]
    label = name_of(measure).label
    if len(measured) < 2:
        return {"arm": None, "lowest": None, "sentence": f"{label}: measured in fewer than two arms"}
    lowest = min(measured, key=lambda arm: _spread(list(arm.values(measure).values()))["mean"])
    others = [arm for arm in measured if arm is not lowest]
    confidence = 1 - (1 - CONFIDENCE) / len(others)
    unclear = []
    for arm in others:
        found = compare(lowest, arm, measure, confidence)
        if found is None or found.mean >= 0 or not is_measurable(found, rows_interval(lowest, arm, confidence)):
            unclear.append(arm.label)
    if unclear:
        sentence = f"best by {label}: not distinguishable. {lowest.label} is lowest, not measurably below "
        return {"arm": None, "lowest": lowest.label, "sentence": sentence + "; ".join(unclear)}
    sentence = f"best by {label}: {lowest.label}, measurably below every other"
    return {"arm": lowest.label, "lowest": lowest.label, "sentence": sentence}


SAYS = {True: "measurable", False: "not measurable", None: "one seed"}
SHORT = {True: "yes", False: "no", None: "one seed"}


@dataclass(frozen=True)
class TextTable:
    """A table.

    Attributes:
        title: Heading.
        columns: Names.
        rows: Cells, one for each column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table without its title; bars and line ends in cells are taken care of."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def measures_table(results: dict[str, Any]) -> TextTable:
    """Mean and range over seeds of every measure, one arm a line."""
    keys = list(results["measures"])
    rows = []
    for i, arm in enumerate(results["arms"]):
        found = [results["measures"][key]["arms"][i] for key in keys]
        num_runs = str(max((len(row["values"]) for row in found), default=0))
        rows.append((arm["label"], num_runs, *(_spread_text(name_of(k), r) for k, r in zip(keys, found, strict=True))))
    return TextTable("Measures, mean [range over seeds]", ("", "runs", *(name_of(k).title for k in keys)), tuple(rows))


def differences_table(results: dict[str, Any]) -> TextTable | None:
    """Every paired difference with its intervals; None where there is no baseline."""
    rows = []
    for key, measure in results["measures"].items():
        name = name_of(key)
        for arm in measure["arms"]:
            if "difference" in arm:
                rows.append((name.label, arm["arm"], arm["difference"]["to"], *_difference(name, arm)))
    columns = ("measure", "", "against", "difference", "t interval", "bootstrap", "over rows", "")
    if not any(row[6] != "-" for row in rows):
        columns, rows = _without(columns, 6), [_without(row, 6) for row in rows]
    title, others = "Paired differences", {row[2] for row in rows}
    if len(others) == 1:
        title += f" to {others.pop()}"
        columns, rows = _without(columns, 2), [_without(row, 2) for row in rows]
    return TextTable(f"{title}, 95% intervals", columns, tuple(rows)) if rows else None


def _difference(name: MeasureName, arm: dict[str, Any]) -> tuple[str, ...]:
    found = arm["difference"]
    intervals = (_interval(name, found.get(k)) for k in ("t_interval", "bootstrap_interval", "rows_interval"))
    return (name.show_difference(found["mean"]), *intervals, SAYS[found["measurable"]])


def _interval(name: MeasureName, interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"[{', '.join(name.show_difference(end) for end in interval)}]"


def _spread_text(name: MeasureName, row: dict[str, Any]) -> str:
    if len(row["values"]) < 2:
        return name.show(row["mean"])
    return f"{name.show(row['mean'])} [{name.show(row['min'])}, {name.show(row['max'])}]"


def _without(row: tuple[str, ...], i: int) -> tuple[str, ...]:
    return (*row[:i], *row[i + 1 :])


def _cell(text: str) -> str:
    plain = "".join(f"\\{c}" if c in "\\|<`*" else c for c in text)
    return " ".join(plain.replace("](", "]\\(").split())  # no link, and no picture fetched from elsewhere


def short_table(results: dict[str, Any]) -> TextTable:
    """For a terminal: every measure of every arm, and its difference with Student's interval."""
    rows = []
    for key, measure in results["measures"].items():
        name = name_of(key)
        rows.append((name.label, "", "", ""))
        for arm in measure["arms"]:
            found = arm.get("difference")
            change = f"{name.show_difference(found['mean'])} {_interval(name, found['t_interval'])}" if found else ""
            rows.append(
                (f"  {arm['arm']}", _spread_text(name, arm), change, SHORT[found["measurable"]] if found else "")
            )
    return TextTable("", ("", "mean [range]", "difference [95%]", "measurable"), tuple(rows))


def verdict_lines(results: dict[str, Any]) -> list[str]:
    """One sentence on each measure, and one on the best arm."""
    said = [f"{name_of(key).label}: {m['verdict']}" for key, m in results["measures"].items() if m["verdict"]]
    return [*said, results["best"]["sentence"]]


def pairing_line(results: dict[str, Any]) -> str:
    """What pairs share, as it was found in the runs' own records."""
    if not results["pairing"]:
        return ""
    words = {"data": "training rows", "base": "base weights", "start": "loss before training"}
    shared = [word for key, word in words.items() if all(pair[key] for pair in results["pairing"])]
    other = [word for word in words.values() if word not in shared]
    line = "Pairs share the seed" + "".join(f", {word}" for word in shared) + " (checked in their records)."
    return line + (f" Not shared: {', '.join(other)}." if other else "")
