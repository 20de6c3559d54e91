"""A sweep's output: its results in files, a line per run while it goes on, and tables on the terminal at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..display.tables import Table
from ..files import write_json, write_text
from .arms import Arm, arms_by
from .folder import is_trained
from .plan import SweepPlan
from .plot import plot_sweep
from .records import read_run
from .results import results_of
from .tables import differences_table, measures_table, pairing_line, short_table, verdict_lines

RESULTS_FILE, MARKDOWN_FILE, PICTURE_FILE = "results.json", "sweep.md", "sweep.png"


# ---- Files ----


def write_results(plan: SweepPlan, output_dir: Path) -> dict[str, Any]:
    """Write the results of the runs that are finished.

    Returns:
        The content of ``results.json``, and ``picture``, whether one was drawn.
    """
    arms = finished_arms(plan, output_dir)
    planned = {"recipe": plan.recipe, "keys": plan.keys, "seeds": plan.seeds, "runs": len(plan.runs)}
    results = {**planned, "finished": sum(len(arm.runs) for arm in arms), **results_of(arms, first=True)}
    write_json(output_dir / RESULTS_FILE, results)
    results = {**results, "picture": plot_sweep(arms, results, output_dir / PICTURE_FILE, _title(plan))}
    write_text(output_dir / MARKDOWN_FILE, markdown(plan, results))
    return results


def finished_arms(plan: SweepPlan, output_dir: Path) -> list[Arm]:
    """Return the arms of the runs that are finished, in the order of the plan's settings."""
    folders = [output_dir / run.name for run in plan.runs]
    return arms_by([read_run(folder) for folder in folders if is_trained(folder)], plan.keys)


def markdown(plan: SweepPlan, results: dict[str, Any]) -> str:
    """Return the content of ``sweep.md``."""
    unfinished = "" if results["finished"] == results["runs"] else f"; {results['finished']} of them finished"
    parts = [
        f"# {_title(plan)}",
        f"{results['runs']} runs{unfinished}, seeds {', '.join(map(str, plan.seeds))}.",
        *(f"## {table.title}\n\n{table.markdown()}" for table in _tables(results)),
        "## What the results show\n\n" + "\n".join(f"- {line}" for line in _sentences(results)),
        *(["![measures and differences](sweep.png)"] if results["picture"] else []),
        results["method"],
    ]
    return "\n\n".join(parts) + "\n"


def _title(plan: SweepPlan) -> str:
    return f"{plan.recipe}: {' and '.join(plan.keys)}"


def _tables(results: dict[str, Any]) -> list[Table]:
    found = [measures_table(results), differences_table(results)]  # without a baseline there are no differences
    return [table for table in found if table is not None and table.rows]


def _sentences(results: dict[str, Any]) -> list[str]:
    return [line for line in (*verdict_lines(results), pairing_line(results)) if line]


# ---- Terminal ----


class SweepDisplay:
    """A `sweep.Display` on a console.

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

    def say(self, line: str, /) -> None:
        """Print a line."""
        self.console.print(line, markup=False)

    def progress(self, name: str, line: str, /) -> None:
        """Show a line until the next; in a pipe do nothing, since the logs have it."""
        if self._status and line.strip():
            self._status.update(Text(f"{name}: {line.strip()}"))


def show_results(results: dict[str, Any], output_dir: Path) -> None:
    """Print a table, what the results show, and where everything is."""
    console = Console(highlight=False)
    console.print(short_table(results).rich(framed=False))
    for line in _sentences(results):
        console.print(line, markup=False, soft_wrap=True)
    drawn = "sweep.png" if results["picture"] else "no sweep.png: pip install 'qlora-neft[plots]'"
    console.print(f"{output_dir}: sweep.md, results.json, {drawn}", markup=False, soft_wrap=True)
    console.print(f"next:\n  qlora-neft report {output_dir}", markup=False, soft_wrap=True)


def show_plan(report: dict[str, Any], *, as_json: bool) -> None:
    """Print the answer of a dry run."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    rows = [(run["name"], str(run["steps"]), f"{run['tokens']:,}", run["state"]) for run in report["runs"]]
    console = Console(highlight=False)
    console.print(Table(("", "steps", "tokens", ""), rows, "Runs, in order").rich(framed=False))
    console.print(f"{len(rows)} runs, {report['tokens']:,} tokens still to train; nothing was written", markup=False)
