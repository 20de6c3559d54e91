"""A sweep on the screen and in its folder: what runs, ``results.json``, ``sweep.md`` and ``sweep.png``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.text import Text

from ..display.markdown import inline
from ..display.plots import (
    BLUE,
    DARK_GREY,
    GREEN,
    LIGHT_GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    new_picture,
    save_picture,
)
from ..display.safe_console import SafeConsole
from ..display.tables import Table
from ..files import write_json, write_text
from .arms import Arm, arms_by, show
from .folder import is_trained
from .plan import SweepPlan
from .records import read_run
from .results import results_of
from .results_file import DryRun, MeasureResults, Results, SweepResults
from .tables import differences_table, made_table, measures_table, name_of, pairing_line, short_table, verdict_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_MEASURES = 5  # that fit beside each other
NOT_DRAWN = {"lowest_held_out_loss"}  # the curves of `report` show it better
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, DARK_GREY)
MARKERS = "osD^vPX"
RESULTS_FILE, MARKDOWN_FILE, PICTURE_FILE = "results.json", "sweep.md", "sweep.png"


# ---- Files ----


def write_results(plan: SweepPlan, output_dir: Path) -> SweepResults:
    """Write the results of the runs that are finished.

    Returns:
        The content of ``results.json``, and ``picture``, whether one was drawn.
    """
    arms = finished_arms(plan, output_dir)
    results: SweepResults = {
        "recipe": plan.recipe,
        "keys": plan.keys,
        "seeds": plan.seeds,
        "runs": len(plan.runs),
        "finished": sum(len(arm.runs) for arm in arms),
        **results_of(arms, first=True, decision=plan.decision),
    }
    write_json(output_dir / RESULTS_FILE, results)
    # After results.json, which does not depend on whether matplotlib is installed.
    results["picture"] = plot_sweep(arms, results, output_dir / PICTURE_FILE, _title(plan))
    write_text(output_dir / MARKDOWN_FILE, markdown(plan, results))
    return results


def finished_arms(plan: SweepPlan, output_dir: Path) -> list[Arm]:
    """Return the arms of the runs that are finished, in the order of the plan's settings."""
    folders = [output_dir / run.name for run in plan.runs]
    return arms_by([read_run(folder) for folder in folders if is_trained(folder)], plan.keys)


def markdown(plan: SweepPlan, results: SweepResults) -> str:
    """Return the content of ``sweep.md``."""
    unfinished = "" if results["finished"] == results["runs"] else f"; {results['finished']} of them finished"
    parts = [
        f"# {inline(_title(plan))}",
        f"{results['runs']} runs{unfinished}, seeds {', '.join(map(str, plan.seeds))}.",
        *(f"## {table.title}\n\n{table.markdown()}" for table in _tables(results)),
        "## What the results show\n\n" + "\n".join(f"- {inline(line)}" for line in _sentences(results)),
        *(["![measures and differences](sweep.png)"] if results["picture"] else []),
        results["method"],
    ]
    return "\n\n".join(parts) + "\n"


def _title(plan: SweepPlan) -> str:
    return f"{plan.recipe}: {' and '.join(plan.keys)}"


def _tables(results: Results) -> list[Table]:
    found = [
        measures_table(results),
        differences_table(results),
        made_table(results),
    ]  # without a baseline there are no differences
    return [table for table in found if table is not None and table.rows]


def _sentences(results: Results) -> list[str]:
    return [line for line in (*verdict_lines(results), pairing_line(results)) if line]


# ---- Terminal ----


class SweepDisplay:
    """A `sweep.Display` on a console.

    Args:
        quiet: Write on stderr.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = SafeConsole(stderr=quiet, highlight=False, soft_wrap=True)
        # A spinner in a pipe or a log would be thousands of lines.
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


def show_results(results: SweepResults, output_dir: Path) -> None:
    """Print a table, what the results show, and where everything is."""
    console = SafeConsole(highlight=False)
    console.print(short_table(results).rich(framed=False))
    for line in _sentences(results):
        console.print(line, markup=False, soft_wrap=True)
    drawn = "sweep.png" if results["picture"] else "no sweep.png: pip install 'qlora-neft[plots]'"
    console.print(f"{output_dir}: sweep.md, results.json, {drawn}", markup=False, soft_wrap=True)
    console.print(f"next:\n  qlora-neft report {output_dir}", markup=False, soft_wrap=True)


def show_plan(report: DryRun, *, as_json: bool) -> None:
    """Print the answer of a dry run."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    rows = [(run["name"], str(run["steps"]), f"{run['tokens']:,}", run["state"]) for run in report["runs"]]
    console = SafeConsole(highlight=False)
    for line in report["decides"]:
        console.print(line, markup=False, soft_wrap=True)
    console.print(Table(("", "steps", "tokens", ""), rows, "Runs, in order").rich(framed=False))
    console.print(f"{len(rows)} runs, {report['tokens']:,} tokens still to train; nothing was written", markup=False)


# ---- The picture ----


def plot_sweep(arms: Sequence[Arm], results: Results, path: Path, title: str) -> bool:
    """Draw the seeds of each arm as points with mean and range, and differences to the baseline with their t interval.

    Args:
        arms: In the order of ``results``.
        results: From `results_of`.
        path: The PNG file.
        title: Heading.

    Returns:
        False if there is nothing to draw, or matplotlib is not installed (extra ``plots``).
    """
    keys = [key for key in results["measures"] if key not in NOT_DRAWN][:MAX_MEASURES]
    drawing = new_picture("", (max(4.2 * len(keys), 6), 6.4)) if keys else None
    if drawing is None:
        return False
    figure, axes = drawing
    axes.remove()  # a picture comes with one panel; this one has two rows of them
    figure.suptitle(title, parse_math=False)  # a dollar sign in a path is not TeX
    panels = figure.subplots(2, len(keys), squeeze=False)
    key, lines = _lines(arms)
    for column, name in enumerate(keys):
        measure = results["measures"][name]
        _values(panels[0][column], lines, measure, key is not None)
        _differences(panels[1][column], lines, measure)
        panels[0][column].set_title(name_of(name).title, fontsize=10)
    panels[0][0].set_ylabel("value: seeds, mean, range")
    panels[1][0].set_ylabel("difference to the baseline\nmean, 95% t interval")
    for panel in panels.flat:
        _finish(panel, key, arms)
    if len(lines) > 1:
        panels[0][0].legend(frameon=False, fontsize=8)
    return save_picture(figure, path)


def _lines(arms: Sequence[Arm]) -> tuple[str | None, dict[str, list[tuple[float, int]]]]:
    """Return the numeric key for the x axis, None to give each arm a place; and by line, its arms' places and indices.

    Arms that differ in other keys as well are on different lines.
    """
    key = next(iter(arms[0].settings), None)  # the key swept first
    numbers = [arm.settings.get(key) for arm in arms]
    if key is None or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        return None, {"": [(float(i), i) for i in range(len(arms))]}
    lines: dict[str, list[tuple[float, int]]] = {}
    for i, arm in enumerate(arms):
        # Further swept keys make further lines, so that a line varies in one key alone.
        rest = ", ".join(f"{k.split('.')[-1]} {show(v)}" for k, v in arm.settings.items() if k != key)
        lines.setdefault(rest, []).append((float(arm.settings[key]), i))
    return key, {name: sorted(line) for name, line in lines.items()}


def _values(panel: Axes, lines: dict[str, list[tuple[float, int]]], measure: MeasureResults, is_numeric: bool) -> None:
    for i, (label, line) in enumerate(lines.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        found = [(x, measure["arms"][arm]) for x, arm in line if measure["arms"][arm]["values"]]
        # Every seed as a faint point, over it the mean with its range.
        seeds = [(x, value) for x, row in found for value in row["values"].values()]
        if not found:
            continue
        panel.plot(*zip(*seeds, strict=True), marker, color=color, markersize=4, alpha=0.5, linestyle="none")
        # None only without values.
        spreads = [cast("tuple[float, float, float]", (row["mean"], row["min"], row["max"])) for _, row in found]
        places, means = [x for x, _ in found], [mean for mean, _, _ in spreads]
        below, above = [mean - low for mean, low, _ in spreads], [high - mean for mean, _, high in spreads]
        style: dict[str, Any] = {"color": color, "capsize": 3, "linewidth": 1.6, "label": label or None}
        joined = "-" if is_numeric else "none"  # between arms in no order a line would mean nothing
        panel.errorbar(places, means, (below, above), marker="_", markersize=12, linestyle=joined, **style)


def _differences(panel: Axes, lines: dict[str, list[tuple[float, int]]], measure: MeasureResults) -> None:
    panel.axhline(0, color=LIGHT_GREY, linewidth=1)
    for i, line in enumerate(lines.values()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        found = [(x, measure["arms"][arm]["difference"]) for x, arm in line if "difference" in measure["arms"][arm]]
        for x, row in found:
            panel.plot([x] * len(row["values"]), row["values"], marker, color=color, markersize=4, alpha=0.5)
            # One seed has no interval: a point without a bar.
            low, high = row["t_interval"] or (row["mean"], row["mean"])
            error = ([row["mean"] - low], [high - row["mean"]])
            panel.errorbar([x], [row["mean"]], error, marker="_", markersize=12, color=color, capsize=3, linewidth=1.6)


def _finish(panel: Axes, key: str | None, arms: Sequence[Arm]) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    if key is None:
        labels = [arm.label for arm in arms]
        panel.set_xticks(range(len(labels)), labels, rotation=30, ha="right", parse_math=False, fontsize=8)
        panel.set_xlim(-0.5, len(labels) - 0.5)
        return
    panel.set_xlabel(key)
    places = sorted({float(arm.settings[key]) for arm in arms})
    # Learning rates span decades, noise strengths 0 to 15; a logarithm also needs every place above zero.
    if places[0] > 0 and places[-1] / places[0] >= 30:
        panel.set_xscale("log")
        panel.set_xlim(places[0] / 1.5, places[-1] * 1.5)
        return
    # `or 1`: a single place has no extent.
    margin = 0.08 * (places[-1] - places[0]) or 1
    panel.set_xlim(places[0] - margin, places[-1] + margin)
    if len(places) <= 8:
        panel.set_xticks(places, [f"{place:g}" for place in places])
