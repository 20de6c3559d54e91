"""What a run left on disk, read back; a run that has not finished has only part of it. No torch."""

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

SWEEP_FILE = "sweep.json"
LEAVE_OUT, MEASURE_AGAIN = "Leave this folder out.", "Remove it to measure again."


class _Model(Record):
    name_or_path: str


class _Data(Record):
    path: Any


class _Train(Record):
    seed: int


class _ResolvedRecipe(Record):
    """What a comparison needs of a recipe; sections beyond these are mappings or null."""

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
    """``sweep.json``."""

    recipe: str
    swept: dict[str, Any]
    runs: list[PlannedRunRecord]


@dataclass(frozen=True)
class RunRecord:
    """A run's folder.

    Attributes:
        name: What to call it beside the others.
        folder: Where it is.
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
    metrics: list[dict[str, Any]] = field(default_factory=list)
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: list[SampleAnswer] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """Of order, dropout, noise and LoRA's start."""
        return self.recipe["train"]["seed"]

    @property
    def settings(self) -> dict[str, Any]:
        """``section.key`` to value; no noise section and alpha 0 are the same settings."""
        return {"neftune.noise_alpha": 0.0, **without_silent_noise(flat(self.recipe))}

    @property
    def values(self) -> dict[str, float]:
        """Every measure by name, those that are no finite number left out."""
        found: dict[str, Any] = dict((self.summary.after if self.summary else None) or {})
        found.pop("answers", None)  # how many an exact match was counted over
        held_out = [entry["eval_loss"] for entry in self.metrics if entry.get("eval_loss") is not None]
        if self.summary and len({entry["step"] for entry in self.metrics if "eval_loss" in entry}) > 2 and held_out:
            found["lowest_held_out_loss"] = min(held_out)  # of a run that was also evaluated on the way
        for measure, numbers in self.measures.items():
            found |= {f"{measure}.{name}": value for name, value in numbers.items()}
        found.pop("loss.held_out_loss", None)  # the summary's, measured again
        numbers = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Read a run's folder.

    Raises:
        UserInputError: If it holds none, or a file of it is damaged.
    """
    about = RunFile.read(folder / RUN_FILE, LEAVE_OUT) or RunFile()
    summary = RunSummary.read(folder / SUMMARY_FILE, LEAVE_OUT)
    recipe = about.recipe or read_record_if_there(folder / RECIPE_FILE) or (summary and summary.recipe)
    if not isinstance(recipe, dict) or "train" not in recipe:
        raise UserInputError(
            f"{folder}: holds no run (run.json, recipe.yaml or summary.json). Give the --output-dir of train or sweep."
        )
    _ResolvedRecipe.checked(recipe, folder, "The recipe in its records is none. Leave this run out.")
    answers = Answers.read(folder / ANSWERS_FILE, MEASURE_AGAIN) or Answers()
    measures = Measures.read(folder / MEASURES_FILE, MEASURE_AGAIN) or Measures()
    return RunRecord(
        name=name or folder.resolve().name,
        folder=folder,
        recipe=recipe,
        about=about,
        summary=summary,
        metrics=_lines(folder / "metrics.jsonl"),
        measures=measures.by_name,
        answers=answers.answers,
    )


def find_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read runs; a sweep's folder stands for those of its runs that have begun. A folder given twice counts once.

    Raises:
        UserInputError: If a folder is missing or holds neither.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserInputError(f"{folder}: no such folder. Give the --output-dir of train or sweep.")
        for path in _runs_of(folder):
            found.setdefault(path.resolve(), path)
    paths = list(found.values())
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_sweep(folder: Path) -> SweepRecord | None:
    """``sweep.json``, None without one."""
    return SweepRecord.read(folder / SWEEP_FILE, LEAVE_OUT)


def _runs_of(folder: Path) -> list[Path]:
    sweep = read_sweep(folder)
    if sweep is None:
        return [folder]
    begun = [folder / run.name for run in sweep.runs if (folder / run.name / RUN_FILE).exists()]
    if not begun:
        raise UserInputError(f"{folder}: no run of this sweep has begun. Start it with the sweep command first.")
    return begun


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _lines(path: Path) -> list[dict[str, Any]]:
    """The numbers that were logged; the last line may be under way."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserInputError(f"{path}: cannot be read ({error}).") from error
    return list(_parsed(text.splitlines()))


def _parsed(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield {key: value for key, value in entry.items() if isinstance(value, int | float)}
