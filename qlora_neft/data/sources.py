"""The sources a recipe's data section names, and the unit that readers hand on: one row."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserInputError
from ..paths import COMPRESSIONS, DATA_SUFFIXES, TABLE_KINDS, TEXT_KINDS, data_kind, resolve_bundled
from ..recipe.schema import Data, MixedSource
from .folders import TRAIN, splits_of_folder


@dataclass(frozen=True)
class Source:
    """One dataset to read: what the recipe says of it, with ``bundled:`` resolved.

    Attributes:
        path: A local file, a folder, a glob pattern of local files (``data/*.jsonl``), or a Hub id.
        split: Which rows, in `datasets` slicing syntax (``train[:128]``, ``train[:10%]``). Local files together are
            one split, ``train``; a folder may have several.
        revision: Revision of a Hub dataset.
        data_files: Which files of a Hub dataset, a glob pattern; None for those the dataset declares.
        name: Which configuration of a Hub dataset, or of a folder cloned from it; None for its default.
        weight: How often each row is used in one epoch.
        format: How rows are read; ``auto`` goes by their columns.
        columns, roles: What the user's columns and speakers are, see `recipe.data`.
        system_prompt: System message of the rows that have none.
        prompt_template: The text around a row; ``auto`` goes by the format.
        key: The name the caller wrote for ``path``, for messages.
    """

    path: str
    split: str
    revision: str | None
    data_files: str | None
    name: str | None
    weight: float
    format: str
    prompt_template: str
    columns: Mapping[str, str | None]
    roles: Mapping[str, str]
    system_prompt: str | None
    key: str


def training_sources(section: Data, key: str = "data.path") -> list[Source]:
    """Return the sources of training rows in order: the section's own, then its mixture.

    Args:
        section: A recipe's data section.
        key: The name the caller wrote for ``section.path``, for messages.
    """
    return [_source(stated, key) for stated in (section, *section.mixture)]


def held_out_sources(section: Data, key: str = "data.path") -> list[Source]:
    """Return the source of held-out rows; none if they are a share of the training rows, or if there are none.

    Args:
        section: A recipe's data section.
        key: The name the caller wrote for ``section.path``, for messages.
    """
    # Each held-out row is measured once.
    own = replace(_source(section, key), weight=1.0)
    if section.eval_path is not None:
        # Format and template are the section's: the two files are rows of one kind.
        path, split = resolve_bundled(section.eval_path), section.eval_split or "train"
        # Revision and files are those of ``section.path``, another dataset.
        return [replace(own, path=path, split=split, revision=None, data_files=None, name=None, key="data.eval_path")]
    if section.eval_split is not None:
        return [replace(own, split=section.eval_split, key="data.eval_split")]
    return []


def _source(stated: Data | MixedSource, key: str) -> Source:
    return Source(
        path=resolve_bundled(stated.path),
        split=stated.split,
        revision=stated.revision,
        data_files=stated.data_files,
        name=stated.name,
        weight=stated.weight,
        format=stated.format,
        prompt_template=stated.prompt_template,
        columns=stated.columns,
        roles=stated.roles,
        system_prompt=stated.system_prompt,
        key=key,
    )


# ---- Rows ----


@dataclass(frozen=True)
class Row:
    """One row of a source, or the reason it cannot be read.

    Attributes:
        number: From 1, counted through all files of the source before it is sliced.
        place: Where a reader finds it: ``line 7``, ``entry 7`` of a JSON array, ``row 7``; with several files
            ``b.jsonl, line 7``.
        values: Its fields by name; None if it cannot be read.
        problem: What is wrong with an unreadable row: continues a sentence that ``place`` begins, without a full stop.
    """

    number: int
    place: str
    values: dict[str, Any] | None
    problem: str | None = None


def row_size(row: Row) -> int:
    """Return about how many characters a row holds."""
    return _size(row.values) if row.values is not None else 0


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


# ---- Local files ----


class LocalFile(NamedTuple):
    """A file and the key the caller wrote for it."""

    path: Path
    key: str

    def refused(self, rest: str) -> UserInputError:
        """Return an error that names the file and continues with ``rest``."""
        return UserInputError(f"{self.key}: {str(self.path)!r}{rest}")


def split_key(key: str) -> str:
    """Return the split's key that belongs to a path's: ``data.eval_split`` for ``data.eval_path``."""
    return key.replace("path", "split")


def local_splits(source: Source) -> dict[str, list[Path]]:
    """Return the files that a local path names, by split: of a folder those it has, of anything else the one ``train``.

    Files of a pattern are sorted by name.

    Raises:
        UserInputError: If there are none, or one is of a kind that cannot be read.
    """
    path = os.path.expanduser(source.path)
    if os.path.isdir(path) and data_kind(path) is None:
        return splits_of_folder(Path(path), source.name, source.key)
    # A file whose name contains a bracket is that file, not a pattern.
    is_pattern = glob.has_magic(path) and not os.path.exists(path)
    files = [Path(match) for match in _matches(path)] if is_pattern else [Path(path)]
    if not files:
        raise UserInputError(
            f"{source.key}: no file matches {source.path!r}. Paths are relative to the current directory."
        )
    for file in files:
        _check(file, source.key, is_pattern)
    return {TRAIN: files}


def _matches(pattern: str) -> list[str]:
    """Return what a pattern matches, except folders on the way."""
    found = set(glob.glob(_with_names_escaped(pattern), recursive=True))
    # A folder that has the ending of a data file stays, to be refused by name.
    return sorted(path for path in found if path.lower().endswith(DATA_SUFFIXES) or not os.path.isdir(path))


def _with_names_escaped(pattern: str) -> str:
    """Escape the folders in front of a pattern that exist as they are written: ``runs[1]/*.jsonl``."""
    head, written = "", pattern.split(os.sep)
    for number, part in enumerate(written):
        place = os.sep.join([*written[:number], part])
        if glob.has_magic(part) and not os.path.isdir(place or os.sep):
            return os.sep.join([*([glob.escape(head)] if number else []), *written[number:]])
        head = place
    return pattern


def _check(file: Path, key: str, is_pattern: bool) -> None:
    if not os.path.exists(file):
        raise UserInputError(f"{key}: no file at {str(file)!r}. Paths are relative to the current directory.")
    # Pipes are refused as well: a file may be read more than once.
    if not file.is_file() or data_kind(file) is None:
        kinds = (*TEXT_KINDS, *TABLE_KINDS)
        what = f"{', '.join(kinds[:-1])} or {kinds[-1]} file"
        rule = f"every file of a pattern must be a {what}" if is_pattern else f"must be a {what}, a folder or a Hub id"
        packed = f" Text may be compressed ({', '.join(COMPRESSIONS)})."
        raise UserInputError(f"{key}: {rule}, got {str(file)!r}.{packed}")
