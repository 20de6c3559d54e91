"""What a search for the learning rate found: the curve from its runs' records, a choice, and ``tune.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..files import write_json, write_text
from .arms import Arm, arms_by, compare, rows_interval
from .decide import HELD_OUT_LOSS, is_measurable
from .folder import divergence_of, is_trained
from .plan import SweepPlan
from .rates import Bracket, Choice, Point, choose, text_of
from .records import RunRecord, read_run
from .results_file import RateTried, TuneResults
from .statistics import CONFIDENCE, Interval, leaves_zero_out
from .tune_picture import draw_curve
from .tuned_recipe import RATE, TUNE_FILE, text_of_copy

PICTURE_FILE = "curve.png"


def points_of(plan: SweepPlan, output_dir: Path) -> list[Point]:
    """Return the curve as `rates` reads it."""
    return [Point(row["rate"], row["loss"], row["verdict"] == "worse") for row in curve_of(plan, output_dir)]


def curve_of(plan: SweepPlan, output_dir: Path) -> list[RateTried]:
    """Read the curve from the runs; all of them are finished, or have diverged."""
    rows: list[RateTried] = []
    arms: dict[float, Arm] = {}
    for rate in sorted({planned.recipe.train.learning_rate for planned in plan.runs}):
        of_rate = [planned for planned in plan.runs if planned.recipe.train.learning_rate == rate]
        losses = {planned.seed: _loss(output_dir / planned.name) for planned in of_rate}
        found = [loss for loss in losses.values() if loss is not None]
        mean = sum(found) / len(found) if len(found) == len(losses) else None
        if mean is not None:
            [arms[rate]] = arms_by([read_run(output_dir / planned.name) for planned in of_rate], [RATE])
        rows.append(
            {"rate": rate, "losses": losses, "loss": mean, "difference": None, "interval": None, "verdict": "diverged"}
        )
    measured = [row for row in rows if row["loss"] is not None]
    if measured:
        lowest = min(measured, key=lambda row: row["loss"] or 0.0)
        lowest["verdict"] = "lowest"
        for row in measured:
            if row is not lowest:
                _compare(row, arms[row["rate"]], arms[lowest["rate"]], len(measured) - 1)
    return rows


def _loss(folder: Path) -> float | None:
    if not is_trained(folder) or divergence_of(folder) is not None:
        return None
    return read_run(folder).values.get(HELD_OUT_LOSS)  # those that are not finite are left out


def _compare(row: RateTried, arm: Arm, lowest: Arm, others: int) -> None:
    """Say whether a rate is measurably worse than the lowest, chosen among as many others."""
    confidence = 1 - (1 - CONFIDENCE) / others  # Bonferroni, as in `decide.best`
    found, over_rows = compare(arm, lowest, HELD_OUT_LOSS, confidence), rows_interval(arm, lowest, confidence)
    assert found is not None  # both have the same seeds
    measurable: bool | None
    interval: Interval | None
    if found.t_interval is None:  # one seed: the rows alone can tell
        interval, measurable = over_rows, over_rows is not None and leaves_zero_out(over_rows)
    else:
        interval, measurable = found.t_interval, is_measurable(found, over_rows)
    is_worse = bool(measurable) and found.mean > 0
    row["difference"], row["interval"] = found.mean, interval
    row["verdict"] = "worse" if is_worse else "not measurably worse"


def results_of(plan: SweepPlan, output_dir: Path, *, own: float, steps: int, full_steps: int) -> TuneResults:
    """Return what a finished search found; nothing is written yet.

    Args:
        plan: All its runs.
        output_dir: Its folder.
        own: The recipe's rate.
        steps, full_steps: Of each run, and of the recipe's own.
    """
    rows = curve_of(plan, output_dir)
    choice = choose([Point(row["rate"], row["loss"], row["verdict"] == "worse") for row in rows], own)
    records = [read_run(output_dir / run.name) for run in plan.runs if is_trained(output_dir / run.name)]
    untrained = _untrained(records)
    return {
        "recipe": plan.recipe,
        "own_rate": own,
        "rate": choice.rate if choice else None,
        "how": choice.how if choice else None,
        "interval": choice.interval if choice else None,
        "steps": steps,
        "full_steps": full_steps,
        "seeds": plan.seeds,
        "untrained_loss": untrained,
        "rates": rows,
        "sentences": sentences_of(
            rows, choice, own, seeds=len(plan.seeds), steps=(steps, full_steps), before=untrained
        ),
        "picture": False,
        "written": None,
    }


def _untrained(records: Sequence[RunRecord]) -> float | None:
    losses = [record.about.before.held_out_loss for record in records if record.about.before]
    found = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return sum(found) / len(found) if found else None


def sentences_of(
    rows: Sequence[RateTried],
    choice: Choice | None,
    own: float,
    *,
    seeds: int,
    steps: tuple[int, int],
    before: float | None = None,
) -> list[str]:
    """Say what a curve shows, and what it does not.

    Args:
        rows: The curve, ascending.
        choice: What was chosen from it.
        own: The recipe's rate.
        seeds: How many.
        steps: Of each run, and of the recipe's own.
        before: Held-out loss of the untrained model.
    """
    diverged = [text_of(row["rate"]) for row in rows if row["loss"] is None]
    said = [f"diverged, and counted as worse than any loss: {', '.join(diverged)}"] if diverged else []
    if choice is None:
        lower = text_of(rows[0]["rate"] / 100)
        return [*said, f"no rate can be chosen, as all diverged. Look at the data, or begin lower: --rates {lower},..."]
    said += _about_choice(choice, rows, own)
    over = "held-out rows; another seed may move it" if seeds == 1 else f"{seeds} seeds"
    said.append(f"the intervals are over {over}")
    loss = min(row["loss"] for row in rows if row["loss"] is not None)
    if before is not None and loss >= before:
        said.append(f"no rate lowered the held-out loss, {before:.4f} before training: these rows teach nothing here")
    if steps[0] < steps[1]:
        said.append(
            f"found in {steps[0]} steps; the best rate of all {steps[1]} may differ (arXiv:1803.02021), and --steps "
            "brings the search closer"
        )
    return said


def _about_choice(choice: Choice, rows: Sequence[RateTried], own: float) -> list[str]:
    """Say which rate was chosen and why, and between which rates the best lies."""
    first, last, lowest = text_of(rows[0]["rate"]), text_of(rows[-1]["rate"]), text_of(choice.lowest)
    if choice.how == "kept":
        return [f"no measurable difference between {first} and {last}: the recipe's {text_of(own)} is kept"]
    side = "above" if lowest == last else "below"
    why = {
        "edge": f"{lowest}: the best is at the edge, nothing {side} it was tried; the true best may lie beyond",
        "grid": f"{lowest}: the lowest of the rates tried; a neighbor diverged, so nothing was fitted between them",
        "parabola": f"{text_of(choice.rate)}: the minimum of a parabola in log(rate) around {lowest}, the lowest tried",
    }
    within = within_of(choice.interval, rows)
    nothing = f"no measurable difference between {first} and {last}: more --steps or held-out rows may tell"
    return [why[choice.how], f"the best lies {within}" if within else nothing]


def within_of(interval: Bracket, rows: Sequence[RateTried]) -> str | None:
    """Say between which rates the best lies, and why not beyond; None if no rate is ruled out."""
    why = {row["rate"]: "diverged" if row["loss"] is None else "measurably worse" for row in rows}
    low, high = (None if rate is None else f"{text_of(rate)} ({why[rate]})" for rate in interval)
    if low and high:
        return f"between {low} and {high}"
    if low:
        return f"above {low}"
    return f"below {high}" if high else None


def write_files(
    results: TuneResults, output_dir: Path, output: Path, *, name: str, words: Sequence[str], force: bool = False
) -> TuneResults:
    """Write ``tune.json``, the picture, and the copy of the recipe.

    Args:
        results: From `results_of`.
        output_dir: The search's folder.
        output: Where the copy goes.
        name: The recipe's name or path.
        words: Overrides that belong to the copy.
        force: Whether a copy that is there may be replaced.

    Returns:
        The content of ``tune.json``.
    """
    results["picture"] = draw_curve(results, output_dir / PICTURE_FILE)
    if results["rate"] is not None:
        text, in_place = text_of_copy(name, words, results["rate"], _remarks(results))
        if not in_place:
            results["sentences"].append(f"{output}: every key is stated, without the comments of {name}")
        if not force and output.exists() and output.read_text(encoding="utf-8") != text:
            results["sentences"].append(
                f"{output}: differs from what would be written, and was left; --force replaces it"
            )
        else:
            write_text(output, text)
        results["written"] = str(output)
    write_json(output_dir / TUNE_FILE, results)
    return results


def _remarks(results: TuneResults) -> list[str]:
    rates, seeds = results["rates"], len(results["seeds"])
    assert results["rate"] is not None and results["interval"] is not None
    how = {
        "parabola": "the minimum of a parabola through the lowest three",
        "grid": "the lowest tried; a neighbor diverged",
        "edge": "the lowest tried, at the edge of what was tried",
        "kept": "kept: no measurable difference between these rates",
    }[str(results["how"])]
    return [
        f"qlora-neft tune: {len(rates)} rates from {text_of(rates[0]['rate'])} to {text_of(rates[-1]['rate'])}, "
        f"{results['steps']} steps, {seeds} seed{'s' * (seeds > 1)}",
        how,
        *([f"the best lies {within}"] if (within := within_of(results["interval"], rates)) else []),
    ]
