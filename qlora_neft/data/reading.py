"""The rows of a source, local or on the Hub, and the fingerprint that identifies them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from datasets import ReadInstruction

from ..errors import UserInputError
from ..files import sha256_of_file, sha256_of_text
from ..paths import COMPRESSIONS, DATA_SUFFIXES, data_kind, kind_of
from .read_hub import hub_rows, hub_version
from .read_local import count_rows, file_rows
from .sources import Row, Source, local_splits, split_key


def read_rows(source: Source, *, streaming: bool = False) -> Iterator[Row]:
    """Yield the rows of a source in order, read as they are asked for.

    Only JSON that is not line by line is in memory as a whole.

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
    splits = local_splits(source)
    if source.split in splits:  # all of it, without counting
        yield from _rows_of(splits[source.split], source.key)
        return
    parts = _slices(splits, source)
    # Each of several splits has a row 1, so their rows are counted through.
    through = count(1) if len({part.splitname for part in parts}) > 1 else None
    for part in parts:
        for row in islice(_rows_of(splits[part.splitname], source.key), part.from_, part.to):
            yield replace(row, number=next(through)) if through else row


def source_fingerprint(source: Source) -> str:
    """Return the SHA-256, as hex, of what a source's rows follow from: the split, and the bytes of local files,
    whatever their names, or the name and commit of a Hub dataset.

    Raises:
        UserInputError: If there is no such file or dataset, or it cannot be read.
    """
    if _is_local(source):
        splits = local_splits(source)
        parts: list[str] = []
        for split, files in splits.items():
            # The name of a file's only split says nothing.
            parts += [split] * (len(splits) > 1) + [_file_hash(file, source.key) for file in files]
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


def _slices(splits: Mapping[str, Sequence[Path]], source: Source) -> list[Any]:
    """Return the parts of a split, each with ``splitname``, its first row and the row after its last, from 0."""
    # Shares and negative places, as in train[:10%], need the number of rows first.
    lengths = {
        name: sum(count_rows(file, source.key) for file in files)
        for name, files in splits.items()
        if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", source.split)
    }
    where = f"{split_key(source.key)}: {source.split!r}"
    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute(lengths or dict.fromkeys(splits, 0))
    except ValueError as error:
        one = next(iter(splits.values()))
        what = "a file" if len(one) == 1 else "files"
        having = f"{what} with the one split {next(iter(splits))!r}" if len(splits) == 1 else ""
        having = having or f"a folder with the splits {', '.join(splits)}"
        raise UserInputError(f"{where} does not fit {source.path!r}, {having}. ({error})") from error
    # Several parts, as in train[:10]+train[20:30], in the order given.
    found = [part for part in parts if part.from_ < part.to]
    if not found:
        total = sum(lengths.values())
        raise UserInputError(
            f"{where} takes none of its {total} rows from {source.path!r}. Give a slice with examples."
        )
    return found


def _file_hash(file: Path, key: str) -> str:
    """Hash a file with its kind: the same bytes give other rows as CSV than as JSON."""
    try:
        digest = sha256_of_file(file)
    except OSError as error:
        raise UserInputError(f"{key}: {str(file)!r} cannot be read. ({error.strerror})") from error
    kind, packed = data_kind(file), file.suffix.lower() if file.suffix.lower() in COMPRESSIONS else ""
    return f"{'.json' if kind == '.jsonl' else kind}{packed} {digest}"
