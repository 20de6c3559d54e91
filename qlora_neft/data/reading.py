"""The rows of a source, local or on the Hub, and the fingerprint that identifies them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from datasets import ReadInstruction

from ..errors import UserInputError
from ..files import sha256_of_file, sha256_of_text
from ..paths import DATA_SUFFIXES, kind_of
from .read_hub import hub_rows, hub_version
from .read_local import count_rows, file_rows
from .sources import Row, Source, local_files, split_key

# The one split of local files, named as `datasets` names it.
EVERY_ROW = "train"


def read_rows(source: Source, *, streaming: bool = False) -> Iterator[Row]:
    """Yield the rows of a source in order, read as they are asked for; only a JSON array is in memory as a whole.

    Args:
        source: Which rows.
        streaming: Whether to read a Hub dataset without downloading it first; local files are always read that way.

    Yields:
        Every row of the split. A row that cannot be read comes with its problem, so that all can be named at once.

    Raises:
        UserInputError: While rows are asked for: if there is no such file or dataset, it cannot be read as rows at
            all, or the split does not fit or takes no rows.
    """
    if not _is_local(source):
        yield from hub_rows(source, streaming=streaming)
        return
    files = local_files(source)
    if source.split == EVERY_ROW:
        yield from _rows_of(files, source.key)
        return
    for begin, end in _slices(files, source):
        yield from islice(_rows_of(files, source.key), begin, end)


def source_fingerprint(source: Source) -> str:
    """Return the SHA-256, as hex, of what a source's rows follow from: the split, and the bytes of local files,
    whatever their names, or the name and commit of a Hub dataset.

    Raises:
        UserInputError: If there is no such file or dataset, or it cannot be read.
    """
    if _is_local(source):
        parts = [_file_hash(file, source.key) for file in local_files(source)]
    else:
        parts = [source.path, str(source.data_files), str(source.name), hub_version(source)]
    return sha256_of_text(repr([*parts, source.split]))


def _is_local(source: Source) -> bool:
    return kind_of(source.path, suffixes=DATA_SUFFIXES) == "local"


def _rows_of(files: Sequence[Path], key: str) -> Iterator[Row]:
    if len(files) == 1:
        yield from file_rows(files[0], key)
        return
    # A file's name is its path below the folder that all of them share.
    folder = os.path.commonpath([file.parent for file in files])
    number = 0
    for file in files:
        name = os.path.relpath(file, folder)
        for row in file_rows(file, key):
            number += 1
            yield replace(row, number=number, place=f"{name}, {row.place}")


def _slices(files: Sequence[Path], source: Source) -> list[tuple[int, int]]:
    """Return the first row and the row after the last of each part of a split, counted from 0."""
    # Shares and negative places, as in train[:10%], need the number of rows first.
    total = sum(count_rows(file, source.key) for file in files)
    where = f"{split_key(source.key)}: {source.split!r}"
    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute({EVERY_ROW: total})
    except ValueError as error:
        what = "a file" if len(files) == 1 else "files"
        raise UserInputError(
            f"{where} does not fit {source.path!r}, {what} with the one split {EVERY_ROW!r}. ({error})"
        ) from error
    # Several parts, as in train[:10]+train[20:30], in the order given.
    slices = [(part.from_, part.to) for part in parts if part.from_ < part.to]
    if not slices:
        raise UserInputError(
            f"{where} takes none of its {total} rows from {source.path!r}. Give a slice with examples."
        )
    return slices


def _file_hash(file: Path, key: str) -> str:
    """Hash a file with its kind: the same bytes give other rows as CSV than as JSON."""
    try:
        digest = sha256_of_file(file)
    except OSError as error:
        raise UserInputError(f"{key}: {str(file)!r} cannot be read. ({error.strerror})") from error
    kind = file.suffix.lower()
    return f"{'.json' if kind == '.jsonl' else kind} {digest}"
