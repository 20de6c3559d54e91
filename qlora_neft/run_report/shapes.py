"""What the records of a run must look like to be shown; a damaged one is named. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import UserInputError


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
