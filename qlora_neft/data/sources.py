"""Where rows come from: what a recipe names, what a reader gives for it, and the local files it means."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserInputError
from ..paths import DATA_SUFFIXES, _matches


@dataclass(frozen=True)
class Source:
    """One dataset of a recipe.

    Attributes:
        path: A local file, a glob pattern of local files (``data/*.jsonl``), or a Hub id.
        split: Which rows, in `datasets` slicing syntax (``train[:128]``, ``train[:10%]``); local files together are
            one split, ``train``.
        revision: Hub revision of a Hub id.
        data_files: Which files of a Hub dataset, a glob pattern; None for what the dataset declares.
        name: Which configuration of a Hub dataset; None for its default.
        weight: Uses of each of its rows in one epoch.
        format: What its rows mean, ``auto`` to go by their columns.
        prompt_template: What is put around a row, ``auto`` to go by the format.
        key: What the caller wrote, for messages.
    """

    path: str
    split: str = "train"
    revision: str | None = None
    data_files: str | None = None
    name: str | None = None
    weight: float = 1.0
    format: str = "auto"
    prompt_template: str = "auto"
    key: str = "data.path"


@dataclass(frozen=True)
class Row:
    """One row of a source, or why there is none.

    Attributes:
        number: From 1, running through all files of the source before it is sliced.
        place: Where a reader finds it: ``line 7``, ``entry 7`` of a JSON array, ``row 7``; with several files
            ``b.jsonl, line 7``.
        values: Its fields by name; None if it cannot be read.
        problem: What is wrong with it then, to follow ``place`` and a comma, without a full stop.
    """

    number: int
    place: str
    values: dict[str, Any] | None
    problem: str | None = None


class LocalFile(NamedTuple):
    """A file and the key the caller wrote for it."""

    path: Path
    key: str

    def refused(self, rest: str) -> UserInputError:
        """An error that names the file, then goes on with ``rest``."""
        return UserInputError(f"{self.key}: {str(self.path)!r}{rest}")


def split_key(key: str) -> str:
    """The key of the split that belongs to the key of a path: ``data.eval_path`` to ``data.eval_split``."""
    return key.replace("path", "split")


def local_files(source: Source) -> list[Path]:
    """The files a local path names, those of a pattern sorted by name.

    Raises:
        UserInputError: If there are none, or one is a folder or not of a kind that can be read.
    """
    path = os.path.expanduser(source.path)
    # A file whose name holds a bracket is that file, not a pattern.
    is_pattern = glob.has_magic(path) and not os.path.exists(path)
    files = [Path(match) for match in _matches(path)] if is_pattern else [Path(path)]
    if not files:
        raise UserInputError(
            f"{source.key}: no file matches {source.path!r}. Paths are relative to the current directory."
        )
    for file in files:
        _check(file, source.key, is_pattern)
    return files


def _check(file: Path, key: str, is_pattern: bool) -> None:
    if not os.path.exists(file):
        raise UserInputError(f"{key}: no file at {str(file)!r}. Paths are relative to the current directory.")
    # Not a pipe either: a file may be read more than once.
    if not file.is_file() or file.suffix.lower() not in DATA_SUFFIXES:
        kinds = f"{', '.join(DATA_SUFFIXES[:-1])} or {DATA_SUFFIXES[-1]} file"
        rule = f"every file of a pattern must be a {kinds}" if is_pattern else f"must be a {kinds} or a Hub id"
        raise UserInputError(f"{key}: {rule}, got {str(file)!r}.")
