"""``report.html`` and ``report.md``: any number of runs on one page that needs nothing from outside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..errors import UserInputError
from ..files.text_file import write_text
from .arms import arms_by, arms_of, differing, show
from .curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, charts, style_of
from .names import in_order, name_of
from .record import RunRecord, find_runs, read_sweep
from .results import results_of
from .samples import samples
from .tables import TextTable, differences_table, measures_table, pairing_line, verdict_lines

PICTURE = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Compare runs.

    Args:
        folders: Of runs, or of sweeps.
        output: The page, ``.html``; a Markdown file of the same name goes beside it.

    Returns:
        The files written.

    Raises:
        UserInputError: If a folder holds no run, or the page cannot be written.
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
    """All that both forms of the page show."""
    runs = find_runs(folders)
    sweep = read_sweep(folders[0]) if len(folders) == 1 else None
    arms = arms_by(runs, list(sweep["swept"])) if sweep else arms_of(runs)
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
    """The page; everything that comes from a run is escaped."""
    return _environment(autoescape=True).get_template("report.html.jinja").render(content)


def markdown(content: dict[str, Any]) -> str:
    """The same as Markdown, without curves."""
    environment = _environment(autoescape=False)
    environment.filters["fenced"] = _fenced
    environment.filters["inline"] = _inline
    return environment.get_template("report.md.jinja").render(content)


def settings_table(runs: Sequence[RunRecord]) -> TextTable | None:
    """The recipe's keys in which runs differ, a run a line; None without any."""
    keys = differing(runs)
    if not keys:
        return None
    rows = tuple((run.name, *(show(run.settings.get(key)) for key in keys)) for run in runs)
    return TextTable("Settings that differ", ("run", *keys), rows)


def runs_table(runs: Sequence[RunRecord]) -> TextTable:
    """Every measure of every run, and what it took."""
    keys = in_order({key for run in runs for key in run.values})
    columns = ("run", "seed", "steps", *(name_of(key).title for key in keys), "training (s)", "peak memory (GiB)")
    rows = []
    for run in runs:
        summary = run.summary or {}
        values = (name_of(key).show(run.values.get(key)) for key in keys)
        steps = str(summary.get("steps", "not finished"))
        rows.append((run.name, str(run.seed), steps, *values, _seconds(summary), _memory(summary)))
    return TextTable("Runs", columns, tuple(rows))


def facts_table(runs: Sequence[RunRecord]) -> TextTable:
    """Model, data, hardware and versions; what all runs share, as far as they have it yet, is said once."""
    facts = [_facts(run) for run in runs]
    rows = []
    for key in dict.fromkeys(key for fact in facts for key in fact):
        values = {run.name: fact[key] for run, fact in zip(runs, facts, strict=True) if key in fact}
        if len(set(values.values())) == 1:
            rows.append((key, next(iter(values.values()))))
        else:
            rows += [(f"{key}, {name}", value) for name, value in values.items()]
    return TextTable("Data, hardware, versions", ("", ""), tuple(rows))


def common_table(runs: Sequence[RunRecord]) -> TextTable:
    """What the recipes have in common."""
    different = set(differing(runs))
    rows = tuple((key, show(value)) for key, value in runs[0].settings.items() if key not in different)
    return TextTable("Settings in common", ("key", "value"), rows)


def _title(runs: Sequence[RunRecord], sweep: dict[str, Any] | None) -> str:
    if sweep is not None:
        return f"Sweep of {', '.join(sweep['swept'])}: {sweep['recipe']}"
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def _facts(run: RunRecord) -> dict[str, str]:
    summary, settings = run.summary or {}, run.settings
    found = {"base": str(settings["model.name_or_path"]), "data": show(settings["data.path"])}
    for part, what in (("train", "training data"), ("eval", "held-out data")):
        rows = (summary.get("data") or {}).get(part)
        if rows:
            found[what] = f"{rows['rows']:,} rows, {rows['tokens']:,} tokens, SHA-256 {rows['sha256'][:16]}"
    if "base_sha256" in run.about:
        found["base weights"] = f"SHA-256 {run.about['base_sha256'][:16]}"
    hardware = summary.get("hardware") or {}
    if hardware:
        found["hardware"] = f"{hardware['name']} ({hardware['device']}), {hardware['threads']} threads"
        found["platform"] = hardware["platform"]
    if "precision" in summary:
        found["precision"] = summary["precision"].removeprefix("precision: ")
    return found | {f"{package} version": version for package, version in (summary.get("versions") or {}).items()}


def _warnings(runs: Sequence[RunRecord]) -> list[str]:
    found = [warning for run in runs for warning in ((run.summary or {}).get("data") or {}).get("warnings", [])]
    return list(dict.fromkeys(found))


def _seconds(summary: dict[str, Any]) -> str:
    return f"{summary['train_seconds']:.0f}" if "train_seconds" in summary else "-"


def _memory(summary: dict[str, Any]) -> str:
    peak = summary.get("peak_memory") or {}
    found = peak.get("cuda_reserved_bytes", peak.get("host_bytes"))
    return "-" if found is None else f"{found / 2**30:.2f}"


def _environment(*, autoescape: bool) -> Environment:
    loader = PackageLoader("qlora_neft.run_report")
    return Environment(
        loader=loader, autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _fenced(text: str) -> str:
    """A block of code that the text cannot end."""
    ticks = "```"
    while ticks in text:
        ticks += "`"
    return f"{ticks}text\n{text}\n{ticks}"


def _inline(text: str) -> str:
    """One line that Markdown takes as it is."""
    return " ".join("".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in text).split())
