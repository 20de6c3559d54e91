"""What a sweep writes of its results: ``results.json``, ``sweep.md``, ``sweep.png``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files.json_file import write_json
from ..files.text_file import write_text
from ..run_report.arms import Arm, arms_by
from ..run_report.record import RunRecord, read_run
from ..run_report.results import results_of
from ..run_report.tables import TextTable, differences_table, measures_table, pairing_line, verdict_lines
from .plan import SweepPlan
from .sweep_plot import plot_sweep

RESULTS_FILE, MARKDOWN_FILE, PICTURE_FILE = "results.json", "sweep.md", "sweep.png"


def finished_arms(plan: SweepPlan, output_dir: Path) -> list[Arm]:
    """Arms of the runs that are finished, in the order of the plan's settings."""
    runs: list[RunRecord] = [
        read_run(output_dir / run.name) for run in plan.runs if (output_dir / run.name / "summary.json").exists()
    ]
    return arms_by(runs, plan.keys)


def write_results(plan: SweepPlan, output_dir: Path) -> dict[str, Any]:
    """Write the results of what is finished.

    Returns:
        The content of ``results.json``.
    """
    arms = finished_arms(plan, output_dir)
    planned = {"recipe": plan.recipe, "keys": plan.keys, "seeds": plan.seeds, "runs": len(plan.runs)}
    results = {**planned, "finished": sum(len(arm.runs) for arm in arms), **results_of(arms, first=True)}
    write_json(output_dir / RESULTS_FILE, results)
    results = {**results, "picture": plot_sweep(arms, results, output_dir / PICTURE_FILE, _title(plan))}
    write_text(output_dir / MARKDOWN_FILE, markdown(plan, results))
    return results


def tables_of(results: dict[str, Any]) -> list[TextTable]:
    """Measures, and differences where there is a baseline."""
    found = [measures_table(results), differences_table(results)]
    return [table for table in found if table is not None and table.rows]


def lines_of(results: dict[str, Any]) -> list[str]:
    """What may be said of the results."""
    return [line for line in (*verdict_lines(results), pairing_line(results)) if line]


def markdown(plan: SweepPlan, results: dict[str, Any]) -> str:
    """``sweep.md``."""
    unfinished = "" if results["finished"] == results["runs"] else f"; {results['finished']} of them finished"
    parts = [
        f"# {_title(plan)}",
        f"{results['runs']} runs{unfinished}, seeds {', '.join(map(str, plan.seeds))}.",
        *(f"## {table.title}\n\n{table.markdown()}" for table in tables_of(results)),
        "## What may be said\n\n" + "\n".join(f"- {line}" for line in lines_of(results)),
        *(["![measures and differences](sweep.png)"] if results["picture"] else []),
        results["method"],
    ]
    return "\n\n".join(parts) + "\n"


def _title(plan: SweepPlan) -> str:
    return f"{plan.recipe}: {' and '.join(plan.keys)}"
