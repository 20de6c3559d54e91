"""The files of runs and sweeps, read back for a comparison; a run that is not finished has only some. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from ..errors import UserInputError
from ..files import read_record_if_there
from ..recipe.settings import flat, without_silent_noise
from ..run_folder.record import (
    ANSWERS_FILE,
    MADE,
    MEASURES_FILE,
    RECIPE_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    Answers,
    Measures,
    Record,
    RunFile,
    RunSummary,
    SampleAnswer,
)

SWEEP_FILE, ROW_LOSSES_FILE = "sweep.json", "row_losses.json"
ON_HELD_OUT_ROWS = ("held_out_loss", "lowest_held_out_loss", "exact_match")  # a summary's measures of them
LEAVE_OUT, MEASURE_AGAIN = "Leave this folder out.", "Remove it to measure again."


class _Model(Record):
    name_or_path: str


class _Data(Record):
    path: Any


class _Train(Record):
    seed: int


class _ResolvedRecipe(Record):
    """The part of a recipe that a comparison needs; further sections are mappings or null."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any] | None]  # ty: ignore[incompatible-mutable-override]  narrower, as pydantic documents

    model: _Model
    data: _Data
    train: _Train


class PlannedRunRecord(Record):
    """A run of a sweep, as it was planned."""

    name: str
    recipe: dict[str, Any] = Field(default_factory=dict)


class SweepRecord(Record):
    """``sweep.json``; ``decides`` is a `decide.Decision`, None in a sweep of an earlier version."""

    recipe: str
    swept: dict[str, Any]
    runs: list[PlannedRunRecord]
    decides: dict[str, Any] | None = None


class RowLosses(Record):
    """``row_losses.json``: the losses of single held-out rows.

    Attributes:
        rows: Hash of the rows.
        sums: Negative log-likelihood of each row, in nats.
        counts: Trained tokens of each row, each by its weight.
    """

    rows: str
    sums: list[float]
    counts: list[float]


@dataclass(frozen=True)
class RunRecord:
    """A run's folder.

    Attributes:
        name: Its name beside the others.
        folder: The folder.
        recipe: Its resolved recipe as it was written down, keys of other versions included.
        about: ``run.json``: hashes of data and base, and what was measured before training.
        summary: ``summary.json``, None before the run's end.
        metrics: Lines of ``metrics.jsonl``.
        measures: ``measures.json``: by measure, numbers by name; among `values` as ``measure.name``.
        answers: Sample answers after training.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    about: RunFile = field(default_factory=RunFile)
    summary: RunSummary | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    measures: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: list[SampleAnswer] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """Seed of data order, dropout, noise and the initial LoRA weights."""
        return self.recipe["train"]["seed"]

    @property
    def settings(self) -> dict[str, Any]:
        """``section.key`` to value; no noise section and alpha 0 are the same settings."""
        return {"neftune.noise_alpha": 0.0, **without_silent_noise(flat(self.recipe))}

    @property
    def values(self) -> dict[str, float]:
        """Every measure by name; those that are not finite numbers are left out."""
        found: dict[str, Any] = dict((self.summary.after if self.summary else None) or {})
        found.pop("answers", None)  # the number of answers behind exact_match
        held_out = [entry["eval_loss"] for entry in self.metrics if entry.get("eval_loss") is not None]
        if self.summary and len({entry["step"] for entry in self.metrics if "eval_loss" in entry}) > 2 and held_out:
            found["lowest_held_out_loss"] = min(held_out)  # only if the run was also evaluated on the way
        for measure, numbers in self.measures.items():
            found |= {f"{measure}.{name}": value for name, value in numbers.items()}
        found.pop("loss.held_out_loss", None)  # the same as the summary's
        # Texts and nulls go: a measure is a number.
        numbers = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def made(self, key: str) -> dict[str, Any] | None:
        """Return how one of `values` was made, None if that was not recorded."""
        if key in ON_HELD_OUT_ROWS:
            rows = self.summary.data.eval if self.summary and self.summary.data else None
            return None if rows is None else {"rows_sha256": rows.sha256[:16]}
        if "." not in key:  # of the run's own training rows
            return {}
        measure, _, name = key.partition(".")
        made = self.measures.get(measure, {}).get(MADE)
        if not isinstance(made, dict):
            return None
        # Some measures make each of their numbers in its own way.
        return made.get(name) if all(isinstance(value, dict) for value in made.values()) else made


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Read a run's folder.

    Raises:
        UserInputError: If it does not hold a run, or one of its files is damaged.
    """
    # Each file may be missing: a run under way has no summary, one of an earlier version no run.json.
    about = RunFile.read(folder / RUN_FILE, LEAVE_OUT) or RunFile()
    summary = RunSummary.read(folder / SUMMARY_FILE, LEAVE_OUT)
    recipe = about.recipe or read_record_if_there(folder / RECIPE_FILE) or (summary and summary.recipe)
    if not isinstance(recipe, dict) or "train" not in recipe:
        raise UserInputError(
            f"{folder}: holds no run (run.json, recipe.yaml or summary.json). Give the --output-dir of train or sweep."
        )
    _ResolvedRecipe.checked(recipe, folder, "Its records hold no usable recipe. Leave this run out.")
    answers = Answers.read(folder / ANSWERS_FILE, MEASURE_AGAIN) or Answers()
    measures = Measures.read(folder / MEASURES_FILE, MEASURE_AGAIN) or Measures()
    return RunRecord(
        name=name or folder.resolve().name,
        folder=folder,
        recipe=recipe,
        about=about,
        summary=summary,
        metrics=_logged(folder / "metrics.jsonl"),
        measures=measures.by_name,
        answers=answers.answers,
    )


def find_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read runs. A sweep's folder stands for those of its runs that have begun; a folder given twice counts once.

    Raises:
        UserInputError: If a folder is missing or holds neither.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserInputError(f"{folder}: no such folder. Give the --output-dir of train or sweep.")
        for path in _runs_of(folder):
            found.setdefault(path.resolve(), path)  # resolved: one run may be reached by two paths
    paths = list(found.values())
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_sweep(folder: Path) -> SweepRecord | None:
    """Read ``sweep.json``, None if there is none."""
    return SweepRecord.read(folder / SWEEP_FILE, LEAVE_OUT)


def read_row_losses(folder: Path) -> RowLosses | None:
    """Read a run's losses by held-out row, None if they were not measured.

    Raises:
        UserInputError: If the file is damaged.
    """
    return RowLosses.read(folder / ROW_LOSSES_FILE, MEASURE_AGAIN)


def _runs_of(folder: Path) -> list[Path]:
    sweep = read_sweep(folder)
    if sweep is None:
        return [folder]
    begun = [folder / run.name for run in sweep.runs if (folder / run.name / RUN_FILE).exists()]
    if not begun:
        raise UserInputError(f"{folder}: no run of this sweep has begun. Start it with the sweep command first.")
    return begun


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the folders' names, each with as many parent folders as are needed to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    # Two folders have two resolved paths, so the whole of them tells them apart at the latest.
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _logged(path: Path) -> list[dict[str, float]]:
    """Read the numbers that were logged; the last line may be incomplete."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserInputError(f"{path}: cannot be read ({error}).") from error
    return list(_parsed(text.splitlines()))


def _parsed(lines: Iterable[str]) -> Iterable[dict[str, float]]:
    for line in lines:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield {key: value for key, value in entry.items() if isinstance(value, int | float)}
