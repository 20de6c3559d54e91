"""Results as tables of text: one shape for the terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .names import MeasureName, name_of

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
        rows.append((arm["label"], num_runs, *(_spread(name_of(k), r) for k, r in zip(keys, found, strict=True))))
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


def _spread(name: MeasureName, row: dict[str, Any]) -> str:
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
            rows.append((f"  {arm['arm']}", _spread(name, arm), change, SHORT[found["measurable"]] if found else ""))
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
