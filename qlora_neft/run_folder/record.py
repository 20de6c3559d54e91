"""The records of a run as they are read back: ``run.json``, ``summary.json``, ``answers.json``, ``measures.json``.

They are typed here once, for every reader. Two ways to read one:

- `Record.read` refuses a damaged file by name, and gives None for a missing one.
- `Record.of` takes what it can from plain values: what has another type is left out. An adapter's record may come
  from an older or newer version, or from another program.

No torch: reports and exports read records without it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import UserInputError
from ..files import read_record_if_there, write_json
from ..recipe import Recipe, recipe_of_record

RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
ANSWERS_FILE = "answers.json"
MEASURES_FILE = "measures.json"
RECIPE_FILE = "recipe.yaml"


class Record(BaseModel):
    """Part of a record. Keys that this version does not know are dropped; those that are not there have a default."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    @classmethod
    def read(cls, path: Path, remedy: str) -> Self | None:
        """Read a record's file.

        Args:
            path: The file.
            remedy: What to do about a damaged one, a sentence.

        Returns:
            The record; None if there is no such file.

        Raises:
            UserInputError: If the file is damaged: it cannot be read, or holds something else.
        """
        content = read_record_if_there(path, remedy)
        return None if content is None else cls.checked(content, path, remedy)

    @classmethod
    def checked(cls, content: Mapping[str, Any], path: Path, remedy: str) -> Self:
        """Return the record in a file's content.

        Raises:
            UserInputError: If it has another shape; names the path, the first place that is wrong and the remedy.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserInputError(f"{path}: is damaged at {place} ({first['msg']}). {remedy}") from error

    @classmethod
    def of(cls, content: Mapping[str, Any] | None) -> Self:
        """Return what can be used of a record: values of another type are left out, with what they would be part of."""
        values = copy.deepcopy(dict(content or {}))
        while True:
            try:
                return cls.model_validate(values)
            except ValidationError as error:
                first = error.errors()[0]  # one at a time: an error may go with what another one is in
                place = first["loc"][:-1] if first["type"] == "missing" else first["loc"]
                if not _remove(values, list(place)):
                    return cls.model_construct()


def _remove(values: Any, place: list[int | str]) -> bool:
    """Take out the value at a place; pydantic ends some places with the name of a type, which is passed over."""
    while place:
        owner = values
        try:
            for part in place[:-1]:
                owner = owner[part]
            del owner[place[-1]]
        except (KeyError, IndexError, TypeError):
            place.pop()
        else:
            return True
    return False


class SampleAnswer(Record):
    """An answer to a held-out prompt."""

    prompt: str
    reference: str
    text: str


class Before(Record):
    """What was measured before training. Losses in nats per trained token; None for NaN, or without held-out rows."""

    clean_train_loss: float | None = None
    held_out_loss: float | None = None
    answers: list[SampleAnswer] | None = None


class RunFile(Record):
    """``run.json``: what a run is, written before it trains; a checkpoint's manifest says the same.

    Attributes:
        recipe: `Recipe.to_dict`, as it was written; None in a damaged record.
        data_sha256: Of what the training rows say and the chat template.
        base_sha256: Of the frozen base's NF4 bytes.
        before: Measured before the first step.
        measured_on: On what: the held-out rows' hash, and how many answers were asked for.
    """

    recipe: dict[str, Any] | None = None
    data_sha256: str | None = None
    base_sha256: str | None = None
    before: Before | None = None
    measured_on: dict[str, Any] | None = None


class Rows(Record):
    """One part of the data, in numbers; see ``data_report.json``."""

    rows: int
    tokens: int
    sha256: str
    source_rows: int | None = None
    trained_tokens: int | None = None
    share_trained: float | None = None
    truncated: int | None = None
    truncated_fraction: float | None = None
    dropped: int | None = None
    empty: int | None = None
    unfit: int | None = None
    without_room: int | None = None
    duplicates: int | None = None
    ended: int | None = None
    lengths: dict[str, int | float | None] | None = None
    histogram: dict[str, list[int]] | None = None


class DataSource(Record):
    """Where rows came from, and how they were read."""

    path: str
    rows: int | None = None
    format: str | None = None
    prompt_template: str | None = None
    weight: float | None = None
    end: str | None = None


class RunData(Record):
    """What a run trained on and was measured on."""

    train: Rows | None = None
    eval: Rows | None = None
    sources: list[DataSource] = []
    warnings: list[str] = []


class Hardware(Record):
    """The machine of a run; a published record names device and kind alone."""

    device: str
    name: str
    threads: int | None = None
    platform: str | None = None


class MemoryUse(Record):
    """The planner's estimate beside what was measured, in bytes."""

    estimated_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    terms: dict[str, Any] | None = None


class RunSummary(Record):
    """``summary.json``: what a run was and what came of it; a published adapter's ``training_summary.json`` has part.

    A dry run's summary ends with ``base_commit``: it is what is known before a weight is loaded.

    Attributes:
        status: ``done`` or ``dry run``.
        recipe: `Recipe.to_dict`, as it was written.
        precision: The arithmetic, in words.
        plan: The resolved machine settings.
        resumed_from_step: Of the last session, None if it began at step 0.
        parameters, lora_parameters: Counted on the loaded model.
        before, after: Measures by name, for instance ``held_out_loss``.
        latest: Of a published checkpoint: the last measures logged, each with its ``step`` and ``value``.
        peak_memory: In bytes, by kind.
    """

    summary_version: int | None = None
    status: str | None = None
    recipe: dict[str, Any] | None = None
    seed: int | None = None
    precision: str | None = None
    plan: dict[str, Any] | None = None
    data: RunData | None = None
    versions: dict[str, str] | None = None
    hardware: Hardware | None = None
    base_commit: str | None = None
    steps: int | None = None
    tokens_seen: int | None = None
    trained_tokens_seen: int | None = None
    bad_steps: int | None = None
    decisions: list[str] = []
    resumed_from_step: int | None = None
    parameters: int | None = None
    lora_parameters: int | None = None
    base_sha256: str | None = None
    base_unchanged: bool | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    latest: dict[str, Any] | None = None
    train_seconds: float | None = None
    wall_seconds: float | None = None
    peak_memory: dict[str, int | float | None] | None = None
    memory: MemoryUse | None = None

    def usable_recipe(self) -> Recipe | None:
        """Return the recorded recipe as far as this version can use it, None without one."""
        return recipe_of_record(self.recipe)


class Answers(Record):
    """``answers.json``: sample answers after training."""

    answers: list[SampleAnswer] = []


class Measures(Record):
    """``measures.json``: what verbs measured of a finished run, numbers by name under each measure's name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]]  # ty: ignore[incompatible-mutable-override]  narrower, as pydantic documents

    @property
    def by_name(self) -> dict[str, dict[str, Any]]:
        """Every measure."""
        return dict(self.__pydantic_extra__)


# ---- Writing ----


def keep_measures(folder: str | Path, name: str, numbers: Mapping[str, Any]) -> None:
    """Put numbers under a measure's name, in place of earlier ones; do nothing for what is not a run's folder.

    Args:
        folder: What the user named; a Hub id or another program's adapter has no such file.
        name: The measure.
        numbers: By name; what is not a finite number is left out.

    Raises:
        UserInputError: If the file that is there is damaged.
    """
    folder = Path(folder).expanduser()
    if not (folder / RECIPE_FILE).is_file():
        return
    found = {key: value for key, value in numbers.items() if _is_number(value)}
    stored = read_record_if_there(folder / MEASURES_FILE, "Remove it to measure again.") or {}
    write_json(folder / MEASURES_FILE, {**stored, name: found})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
