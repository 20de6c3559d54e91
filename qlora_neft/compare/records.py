"""What a run left on disk, read back; a run that has not finished has only part of it. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import UserInputError
from ..files import read_record_if_there

SWEEP_FILE, MEASURES_FILE, ANSWERS_FILE = "sweep.json", "measures.json", "answers.json"


@dataclass(frozen=True)
class RunRecord:
    """A run's folder.

    Attributes:
        name: What to call it beside the others.
        folder: Where it is.
        recipe: Its resolved recipe as plain values.
        about: ``run.json``: hashes of data and base, and what was measured before training.
        summary: ``summary.json``, None before the run's end.
        metrics: Lines of ``metrics.jsonl``.
        measures: ``measures.json``: by measure, numbers by name; among `values` as ``measure.name``.
        answers: ``answers.json``: ``prompt``, ``reference`` and ``text`` of sample answers after training.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: list[dict[str, str]] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """Of order, dropout, noise and LoRA's start."""
        return self.recipe["train"]["seed"]

    @property
    def settings(self) -> dict[str, Any]:
        """``section.key`` to value; no noise section and alpha 0 are the same settings."""
        flat = {f"{name}.{key}": value for name, keys in self.recipe.items() for key, value in (keys or {}).items()}
        if not flat.get("neftune.noise_alpha") and not flat.get("neftune.final_alpha"):
            flat = {key: value for key, value in flat.items() if not key.startswith("neftune.")}
        return {"neftune.noise_alpha": 0.0, **flat}

    @property
    def values(self) -> dict[str, float]:
        """Every measure by name, those that are no finite number left out."""
        found: dict[str, Any] = dict((self.summary or {}).get("after") or {})
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
    about = _record(folder / "run.json", About) or {}
    summary = _record(folder / "summary.json", Summary)
    recipe = about.get("recipe") or read_record_if_there(folder / "recipe.yaml") or (summary or {}).get("recipe")
    if not isinstance(recipe, dict) or "train" not in recipe:
        raise UserInputError(
            f"{folder}: holds no run (run.json, recipe.yaml or summary.json). Give the --output-dir of train or sweep."
        )
    checked(recipe, Recipe, folder, "The recipe in its records is none. Leave this run out.")
    answers = _record(folder / ANSWERS_FILE, Answers) or {}
    return RunRecord(
        name=name or folder.resolve().name,
        folder=folder,
        recipe=recipe,
        about=about,
        summary=summary,
        metrics=_lines(folder / "metrics.jsonl"),
        measures=_record(folder / MEASURES_FILE, Measures) or {},
        answers=list(answers.get("answers", [])),
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


def read_sweep(folder: Path) -> dict[str, Any] | None:
    """``sweep.json``, None without one."""
    return _record(folder / SWEEP_FILE, Sweep)


def _record(path: Path, shape: type) -> dict[str, Any] | None:
    remedy = "Remove it to measure again." if path.name in (MEASURES_FILE, ANSWERS_FILE) else "Leave this folder out."
    return checked(read_record_if_there(path, remedy), shape, path, remedy)


def _runs_of(folder: Path) -> list[Path]:
    sweep = read_sweep(folder)
    if sweep is None:
        return [folder]
    begun = [folder / run["name"] for run in sweep["runs"] if (folder / run["name"] / "run.json").exists()]
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


class _Record(BaseModel):
    model_config = ConfigDict(protected_namespaces=())  # a recipe's section is called model


class _Answer(_Record):
    prompt: str
    reference: str
    text: str


class Answers(_Record):
    """``answers.json``."""

    answers: list[_Answer] = []


class _Before(_Record):
    answers: list[_Answer] | None = None


class About(_Record):
    """``run.json``."""

    recipe: dict[str, Any] | None = None
    before: _Before | None = None
    base_sha256: str = ""


class _Model(_Record):
    name_or_path: str


class _Data(_Record):
    path: Any


class _Train(_Record):
    seed: int


class Recipe(_Record):
    """A resolved recipe; sections beyond these are mappings or null."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    __pydantic_extra__: dict[str, dict[str, Any] | None]

    model: _Model
    data: _Data
    train: _Train


class _Rows(_Record):
    rows: int
    tokens: int
    sha256: str


class _DataReport(_Record):
    train: _Rows | None = None
    eval: _Rows | None = None
    warnings: list[str] = []


class _Hardware(_Record):
    name: str
    device: str
    threads: int
    platform: str


class Summary(_Record):
    """``summary.json``."""

    recipe: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    data: _DataReport | None = None
    hardware: _Hardware | None = None
    versions: dict[str, str] | None = None
    precision: str = ""
    train_seconds: float = 0.0
    peak_memory: dict[str, float | None] | None = None


class Measures(_Record):
    """``measures.json``: numbers by measure."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]]


class _PlannedRun(_Record):
    name: str


class Sweep(_Record):
    """``sweep.json``."""

    recipe: str
    swept: dict[str, Any]
    runs: list[_PlannedRun]


def checked(content: dict[str, Any] | None, shape: type[BaseModel], path: Path, remedy: str) -> dict[str, Any] | None:
    """A record as it is, None for a missing one.

    Raises:
        UserInputError: If it has another shape.
    """
    if content is None:
        return None
    try:
        shape.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserInputError(f"{path}: is damaged at {place} ({first['msg']}). {remedy}") from error
    return content
