"""``report.html`` and ``report.md``: any number of runs on one page that needs no network and no other file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..display.markdown import block, inline, visible
from ..display.tables import Table
from ..errors import UserInputError
from ..files import write_text
from ..run_folder.record import RunData, RunSummary, SampleAnswer
from .alike import kinds_of
from .arms import Arm, arms_by, arms_of, differing, show
from .decide import Decision
from .records import RunRecord, SweepRecord, find_runs, read_sweep
from .results import results_of
from .tables import differences_table, in_order, made_table, measures_table, name_of, pairing_line, verdict_lines

MAX_PROMPTS = 5  # whose answers are shown
WIDTH, HEIGHT = 420, 270  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 12, 42  # margins around the curves
PICTURE = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
NUM_COLORS, DASHES = 7, ("", "7 4", "2 3")
MAX_POINTS, MAX_MARKS = 300, 40  # of a curve; with more points it is drawn without marks
CURVES = (
    ("clean_loss", "clean train loss", "no noise, no dropout"),
    ("eval_loss", "held-out loss", "no noise, no dropout"),
    ("loss", "train loss", "under noise and dropout"),
)
Points = list[tuple[float, float]]


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Compare runs on a page.

    Args:
        folders: Folders of runs or of sweeps.
        output: The page, ``.html``; a Markdown file of the same name goes beside it.

    Returns:
        The files written.

    Raises:
        UserInputError: If a folder does not hold a run, or the page cannot be written.
    """
    content = page_content(folders)
    texts = {output: html(content), output.with_suffix(".md"): markdown(content)}
    try:
        for path, text in texts.items():
            write_text(path, text)
    except OSError as error:
        raise UserInputError(f"--output: {str(output)!r} cannot be written ({error.strerror}).") from error
    return list(texts)


def page_content(folders: Sequence[Path]) -> dict[str, Any]:
    """Return everything that both forms of the page show, under the names that the templates use."""
    runs = find_runs(folders)
    # A sweep says which keys it varies; among runs from anywhere the differing keys are found by comparing.
    sweep = read_sweep(folders[0]) if len(folders) == 1 else None
    arms = arms_by(runs, list(sweep.swept)) if sweep else arms_of(runs)
    # In a sweep the first setting serves as baseline if none is without noise; among any runs none is singled out.
    results = results_of(arms, first=sweep is not None, decision=Decision.of(sweep.decides if sweep else None))
    has_several = len(arms) > 1
    shown = [measures_table(results), differences_table(results)] if has_several else []
    made = made_table(results)
    return {
        "title": _title(runs, sweep),
        "runs": runs,
        "arms": [{"label": arm.label, "style": style_of(i), "runs": len(arm.runs)} for i, arm in enumerate(arms)],
        "charts": charts(arms),
        "picture": PICTURE,
        "settings": settings_table(runs),
        "runs_table": runs_table(runs),
        "tables": [table for table in shown if table is not None and len(table.columns) > 2] + [made] * bool(made),
        "verdicts": [*verdict_lines(results), pairing_line(results)] if has_several else [],
        "method": results["method"] if shown and shown[1] else "",
        "samples": samples(arms),
        "facts": facts_table(runs),
        "warnings": _warnings(runs),
        "common": common_table(runs),
        "unfinished": [run.name for run in runs if run.summary is None],
    }


def html(content: dict[str, Any]) -> str:
    """Return the page; everything that comes from a run is escaped."""
    # Answers of a model are foreign text: one may hold a script.
    return _environment(autoescape=True).get_template("report.html.jinja").render(content)


def markdown(content: dict[str, Any]) -> str:
    """Return the page as Markdown, without curves."""
    environment = _environment(autoescape=False)
    environment.filters |= {"block": block, "inline": inline}
    return environment.get_template("report.md.jinja").render(content)


# ---- Tables ----


def settings_table(runs: Sequence[RunRecord]) -> Table | None:
    """Return the recipe's keys in which runs differ, one row per run; None if there are none."""
    keys = differing(runs)
    if not keys:
        return None
    rows = [(run.name, *(show(run.settings.get(key)) for key in keys)) for run in runs]
    return Table(("run", *keys), rows, "Settings that differ")


def runs_table(runs: Sequence[RunRecord]) -> Table:
    """Return every measure of every run, its time and its memory."""
    kinds = [kind for key in in_order({key for run in runs for key in run.values}) for kind in kinds_of(key, runs)]
    titles = (name_of(kind.name).title for kind in kinds)
    columns = ("run", "seed", "steps", *titles, "training (s)", "peak memory (GiB)")
    rows = []
    for run in runs:
        summary = run.summary or RunSummary()
        values = (name_of(kind.key).show(run.values.get(kind.key) if kind.is_of(run) else None) for kind in kinds)
        rows.append((run.name, str(run.seed), _steps(summary), *values, _seconds(summary), _memory(summary)))
    return Table(columns, rows, "Runs")


def _steps(summary: RunSummary) -> str:
    """Return the steps taken, of how many, and whose weights the result has, where held-out rows decided."""
    if summary.steps is None:
        return "not finished"
    found = summary.selection
    if found is None or found.step is None:
        return str(summary.steps)
    planned = f" of {found.planned_steps}" if found.stopped_early else ""
    return f"{summary.steps}{planned}, weights of {found.step}"


def facts_table(runs: Sequence[RunRecord]) -> Table:
    """Return model, data, hardware and versions; what is the same for all runs that have it is listed once."""
    facts = [_facts(run) for run in runs]
    rows = []
    for key in dict.fromkeys(key for fact in facts for key in fact):
        values = {run.name: fact[key] for run, fact in zip(runs, facts, strict=True) if key in fact}
        if len(set(values.values())) == 1:  # a run that lacks the fact, unfinished, does not count against it
            rows.append((key, next(iter(values.values()))))
        else:
            rows += [(f"{key}, {name}", value) for name, value in values.items()]
    return Table(("", ""), rows, "Data, hardware, versions")


def common_table(runs: Sequence[RunRecord]) -> Table:
    """Return the settings that all runs have in common."""
    different = set(differing(runs))
    rows = [(key, show(value)) for key, value in runs[0].settings.items() if key not in different]
    return Table(("key", "value"), rows, "Settings in common")


def _title(runs: Sequence[RunRecord], sweep: SweepRecord | None) -> str:
    if sweep is not None:
        return f"Sweep of {', '.join(sweep.swept)}: {sweep.recipe}"
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def _facts(run: RunRecord) -> dict[str, str]:
    summary, settings = run.summary or RunSummary(), run.settings
    data = summary.data or RunData()
    found = {"base": str(settings["model.name_or_path"]), "data": show(settings["data.path"])}
    for rows, what in ((data.train, "training data"), (data.eval, "held-out data")):
        if rows:
            found[what] = f"{rows.rows:,} rows, {rows.tokens:,} tokens, SHA-256 {rows.sha256[:16]}"
    if run.about.base_sha256 is not None:
        found["base weights"] = f"SHA-256 {run.about.base_sha256[:16]}"
    if hardware := summary.hardware:
        threads = "" if hardware.threads is None else f", {hardware.threads} threads"
        found["hardware"] = f"{hardware.name} ({hardware.device}){threads}"
        if hardware.platform is not None:
            found["platform"] = hardware.platform
    if summary.precision is not None:
        found["precision"] = summary.precision.removeprefix("precision: ")
    return found | {f"{package} version": version for package, version in (summary.versions or {}).items()}


def _warnings(runs: Sequence[RunRecord]) -> list[str]:
    data = [run.summary.data for run in runs if run.summary and run.summary.data]
    return list(dict.fromkeys(warning for part in data for warning in part.warnings))


def _seconds(summary: RunSummary) -> str:
    return "-" if summary.train_seconds is None else f"{summary.train_seconds:.0f}"


def _memory(summary: RunSummary) -> str:
    peak = summary.peak_memory or {}
    found = peak.get("cuda_reserved_bytes", peak.get("host_bytes"))  # of the GPU where there is one
    return "-" if found is None else f"{found / 2**30:.2f}"


# ---- Answers ----


@dataclass(frozen=True)
class Said:
    """An answer, and a line on the model that gave it."""

    who: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A prompt, its reference, and what models said, in the order of the page."""

    prompt: str
    reference: str
    answers: list[Said]


def samples(arms: Sequence[Arm]) -> list[Sample]:
    """Return the first prompts with their reference and the answers of the base and of each arm's first run.

    A run's answers before training come from its ``run.json``, those after training from its ``answers.json``.
    """
    firsts = [(arm.label, arm.runs[0]) for arm in arms]
    # By prompt: runs with the same held-out rows answer the same ones.
    found: dict[str, Sample] = {}
    for _, run in firsts:
        for answer in _before(run):
            answers = found.setdefault(answer.prompt, _sample(answer)).answers
            one = Said(f"{run.recipe['model']['name_or_path']}, before training", said(answer.text))
            if one not in answers:  # runs on one base begin with the same answers
                answers.append(one)
    for label, run in firsts:
        for answer in run.answers:
            one = Said(f"{label}, after (seed {run.seed})", said(answer.text))
            found.setdefault(answer.prompt, _sample(answer)).answers.append(one)
    return list(found.values())[:MAX_PROMPTS]


def _before(run: RunRecord) -> list[SampleAnswer]:
    before = run.about.before
    return (before.answers if before else None) or []


def _sample(answer: SampleAnswer) -> Sample:
    return Sample(said(answer.prompt), said(answer.reference), [])


def said(text: str) -> str:
    """Replace control characters by the replacement character, and a blank text by a word that says so."""
    # Browsers and Markdown drop or reinterpret control characters; a reader should see that the model wrote some.
    return visible(text) if text.strip() else "(blank)"


# ---- Rendering ----


def _environment(*, autoescape: bool) -> Environment:
    loader = PackageLoader("qlora_neft.compare")
    return Environment(
        loader=loader, autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


# ---- Charts ----


@dataclass(frozen=True)
class Style:
    """How an arm is drawn.

    Attributes:
        color: Number of its color in the style sheet.
        dash: SVG's ``stroke-dasharray``, empty for a solid line.
    """

    color: int
    dash: str


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        style: Its arm's.
        path: ``x,y`` pairs, as SVG takes them.
        marks: Places where it was measured; empty if they are too many to show.
        name: The run's.
    """

    style: Style
    path: str
    marks: tuple[tuple[float, float], ...]
    name: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis and the number written there."""

    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A picture of curves; all places are in SVG units."""

    title: str
    remark: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def style_of(index: int) -> Style:
    """Return an arm's style by its number; colors repeat with other dashes."""
    return Style(index % NUM_COLORS, DASHES[index // NUM_COLORS % len(DASHES)])


def charts(arms: Sequence[Arm]) -> list[Chart]:
    """Return one chart for each loss that any run logged, one curve per run in its arm's style."""
    found = [_chart(arms, *curve) for curve in CURVES]
    return [chart for chart in found if chart is not None]


def curve_of(run: RunRecord, key: str) -> Points:
    """Return steps and finite values of a logged quantity."""
    # A step may be logged more than once, as the last one is: its last entry counts.
    points = {entry["step"]: entry[key] for entry in run.metrics if entry.get(key) is not None}
    return [(float(step), float(value)) for step, value in sorted(points.items()) if math.isfinite(value)]


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """Reduce a curve to at most ``most`` points by averaging neighbors; the first and the last stay as they are."""
    if len(points) <= most:
        return points
    # Means, not every n-th point: a training loss is noisy, and a pick would show its noise as its course.
    inner, size = points[1:-1], math.ceil((len(points) - 2) / (most - 2))
    groups = [inner[i : i + size] for i in range(0, len(inner), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [points[0], *means, points[-1]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    rough = (high - low) / count or 1.0  # a flat curve still needs a scale
    power = 10 ** math.floor(math.log10(rough))
    # 0.999 and 1e-9: what is a round number up to binary rounding counts as one.
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _chart(arms: Sequence[Arm], key: str, title: str, remark: str) -> Chart | None:
    curves = [(i, run, curve_of(run, key)) for i, arm in enumerate(arms) for run in arm.runs]
    curves = [(i, run, points) for i, run, points in curves if points]
    if not curves:
        return None
    xs = [x for _, _, points in curves for x, _ in points]
    ys = [y for _, _, points in curves for _, y in points]
    # Steps begin at 0, where the untrained model was measured; losses need no zero.
    x_range, y_range = (min(0.0, *xs), max(xs)), _padded(min(ys), max(ys))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + _share(point[0], x_range) * (WIDTH - LEFT - RIGHT)
        # SVG's y axis points down.
        y = HEIGHT - BOTTOM - _share(point[1], y_range) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)  # a tenth of a unit is below a pixel; more digits only make the page larger

    lines = tuple(_line(style_of(i), run, [place(point) for point in thinned(points)]) for i, run, points in curves)
    x_ticks = tuple(Tick(place((x, y_range[0]))[0], f"{x:g}") for x in ticks(*x_range))
    y_ticks = tuple(Tick(place((0.0, y))[1], f"{y:.4g}") for y in ticks(*y_range))
    return Chart(title, remark, lines, x_ticks, y_ticks)


def _line(style: Style, run: RunRecord, places: Points) -> Line:
    path = " ".join(f"{x},{y}" for x, y in places)
    return Line(style, path, tuple(places) if len(places) <= MAX_MARKS else (), run.name)


def _share(value: float, span: tuple[float, float]) -> float:
    low, high = span
    return (value - low) / (high - low) if high > low else 0.5


def _padded(low: float, high: float) -> tuple[float, float]:
    # A flat curve is padded by its height, one at zero by half a unit: the range is never empty.
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return low - pad, high + pad
