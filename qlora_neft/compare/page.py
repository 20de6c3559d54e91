"""``report.html`` and ``report.md``: any number of runs on one page that needs no network and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..display.tables import Table
from ..errors import UserInputError
from ..files import write_text
from ..run_folder.record import RunData, RunSummary, SampleAnswer
from .arms import Arm, arms_by, arms_of, differing, show
from .charts import PICTURE, charts, style_of
from .names import in_order, name_of
from .records import RunRecord, SweepRecord, find_runs, read_sweep
from .results import results_of
from .tables import differences_table, measures_table, pairing_line, verdict_lines

MAX_PROMPTS = 5  # whose answers are shown


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
    sweep = read_sweep(folders[0]) if len(folders) == 1 else None
    arms = arms_by(runs, list(sweep.swept)) if sweep else arms_of(runs)
    results = results_of(arms, first=sweep is not None)
    has_several = len(arms) > 1
    shown = [measures_table(results), differences_table(results)] if has_several else []
    return {
        "title": _title(runs, sweep),
        "runs": runs,
        "arms": [{"label": arm.label, "style": style_of(i), "runs": len(arm.runs)} for i, arm in enumerate(arms)],
        "charts": charts(arms),
        "picture": PICTURE,
        "settings": settings_table(runs),
        "runs_table": runs_table(runs),
        "tables": [table for table in shown if table is not None and len(table.columns) > 2],
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
    return _environment(autoescape=True).get_template("report.html.jinja").render(content)


def markdown(content: dict[str, Any]) -> str:
    """Return the page as Markdown, without curves."""
    environment = _environment(autoescape=False)
    environment.filters["fenced"] = _fenced
    environment.filters["inline"] = _inline
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
    keys = in_order({key for run in runs for key in run.values})
    columns = ("run", "seed", "steps", *(name_of(key).title for key in keys), "training (s)", "peak memory (GiB)")
    rows = []
    for run in runs:
        summary = run.summary or RunSummary()
        values = (name_of(key).show(run.values.get(key)) for key in keys)
        steps = "not finished" if summary.steps is None else str(summary.steps)
        rows.append((run.name, str(run.seed), steps, *values, _seconds(summary), _memory(summary)))
    return Table(columns, rows, "Runs")


def facts_table(runs: Sequence[RunRecord]) -> Table:
    """Return model, data, hardware and versions; what is the same for all runs that have it is listed once."""
    facts = [_facts(run) for run in runs]
    rows = []
    for key in dict.fromkeys(key for fact in facts for key in fact):
        values = {run.name: fact[key] for run, fact in zip(runs, facts, strict=True) if key in fact}
        if len(set(values.values())) == 1:
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
    found = peak.get("cuda_reserved_bytes", peak.get("host_bytes"))
    return "-" if found is None else f"{found / 2**30:.2f}"


# ---- Answers ----


def samples(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the first prompts with their reference and the answers of the base and of each arm's first run.

    Returns:
        ``prompt``, ``reference`` and ``answers`` (``who``, ``text``) each. A run's answers before training come from
        its ``run.json``, those after training from its ``answers.json``.
    """
    firsts = [(arm.label, arm.runs[0]) for arm in arms]
    found: dict[str, dict[str, Any]] = {}
    for _, run in firsts:
        for answer in _before(run):
            entry = found.setdefault(answer.prompt, {**_question(answer), "answers": []})
            said = {"who": f"{run.recipe['model']['name_or_path']}, before training", "text": visible(answer.text)}
            if said not in entry["answers"]:
                entry["answers"].append(said)
    for label, run in firsts:
        for answer in run.answers:
            entry = found.setdefault(answer.prompt, {**_question(answer), "answers": []})
            entry["answers"].append({"who": f"{label}, after (seed {run.seed})", "text": visible(answer.text)})
    return list(found.values())[:MAX_PROMPTS]


def _before(run: RunRecord) -> list[SampleAnswer]:
    before = run.about.before
    return (before.answers if before else None) or []


def _question(answer: SampleAnswer) -> dict[str, str]:
    return {"prompt": visible(answer.prompt), "reference": visible(answer.reference)}


def visible(text: str) -> str:
    """Replace control characters by the replacement character, and a blank text by a word that says so."""
    return "".join("\ufffd" if c < " " and c not in "\n\t" else c for c in text) if text.strip() else "(blank)"


# ---- Rendering ----


def _environment(*, autoescape: bool) -> Environment:
    loader = PackageLoader("qlora_neft.compare")
    return Environment(
        loader=loader, autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _fenced(text: str) -> str:
    """Return a code block whose fence is longer than any in the text, so that the text cannot end it."""
    ticks = "```"
    while ticks in text:
        ticks += "`"
    return f"{ticks}text\n{text}\n{ticks}"


def _inline(text: str) -> str:
    """Return the text as one line, with Markdown's special characters escaped."""
    return " ".join("".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in text).split())
