"""What a person sees of a sweep: a line when a run begins and ends, its progress on a terminal, tables at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..run_report.tables import TextTable, short_table
from .output import lines_of

NARROW: dict[str, Any] = {"show_edge": False, "pad_edge": False}


class SweepDisplay:
    """`sweep.Display` on a console.

    Args:
        quiet: Write on stderr.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=quiet, highlight=False, soft_wrap=True)
        self._status = self.console.status("") if self.console.is_terminal else None

    def __enter__(self) -> SweepDisplay:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, markup=False)

    def progress(self, name: str, line: str) -> None:
        """Show a line until the next; nothing in a pipe, where the logs have it."""
        if self._status and line.strip():
            self._status.update(Text(f"{name}: {line.strip()}"))


def show_results(results: dict[str, Any], output_dir: Path) -> None:
    """A table on stdout, what may be said of them, and where everything is."""
    console = Console(highlight=False)
    console.print(_rich(short_table(results)))
    for line in lines_of(results):
        console.print(line, markup=False, soft_wrap=True)
    drawn = "sweep.png" if results["picture"] else "no sweep.png: pip install 'qlora-neft[plots]'"
    console.print(f"{output_dir}: sweep.md, results.json, {drawn}", markup=False, soft_wrap=True)
    console.print(f"next:\n  qlora-neft report {output_dir}", markup=False, soft_wrap=True)


def show_plan(report: dict[str, Any], *, as_json: bool) -> None:
    """A dry run's answer on stdout."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    rows = [(run["name"], str(run["steps"]), f"{run['tokens']:,}", run["state"]) for run in report["runs"]]
    table = TextTable("Runs, in order", ("", "steps", "tokens", ""), tuple(rows))
    console = Console(highlight=False)
    console.print(_rich(table))
    console.print(f"{len(rows)} runs, {report['tokens']:,} tokens still to train; nothing was written", markup=False)


def _rich(table: TextTable) -> Table:
    shown = Table(title=Text(table.title) if table.title else None, title_justify="left", box=SIMPLE_HEAD, **NARROW)
    for i, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="left" if i == 0 else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown
