"""The rows of a Hub dataset, one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, count
from typing import cast

from datasets import Dataset, IterableDataset, ReadInstruction, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from pyarrow import ArrowException

from ..errors import UserInputError, first_line
from .sources import Row, Source, split_key

# HTTPError: the Hub client lets some through, and they are not OSErrors. RuntimeError: a dataset that is a script.
HUB_ERRORS = (DatasetsError, HTTPError, ArrowException, OSError, ValueError, RuntimeError)
NUMBERED_PART = re.compile(r"(?P<name>\w+(?:\.\w+)*)(?:\[(?P<begin>\d*):(?P<end>\d*)\])?")


def hub_rows(source: Source, *, streaming: bool = False) -> Iterator[Row]:
    """Yield the rows of a Hub dataset, numbered as in its split before slicing.

    Args:
        source: A Hub id, and which of its rows.
        streaming: Whether to fetch rows as they are asked for, without downloading the dataset first.

    Raises:
        UserInputError: If there is no such dataset, revision, file or split, the Hub cannot be reached (also between
            two rows), or the split takes no rows.
    """
    row = None
    for row in _streamed(source) if streaming else _downloaded(source):
        yield row
    if row is None:
        raise UserInputError(
            f"{split_key(source.key)}: {source.split!r} takes none from {source.path!r}. Give a slice with examples."
        )


def hub_version(source: Source) -> str:
    """Identify a Hub dataset's content: by the commit of its revision, or, if the Hub cannot be reached, by the
    fingerprint that `datasets` gives the local copy.

    Raises:
        UserInputError: If there is neither.
    """
    try:
        commit = HfApi().dataset_info(source.path, revision=source.revision).sha
    except (HTTPError, OSError, ValueError):
        commit = None
    if commit is None:
        local = _load(source, source.split)
        # Private, but `datasets` has no public name for it.
        return "no rows" if local is None else f"local {local._fingerprint}"
    return f"commit {commit}"


# ---- Downloaded ----


def _downloaded(source: Source) -> Iterator[Row]:
    dataset = _load(source, source.split)
    if dataset is not None:
        yield from _numbered(dataset, _numbers(dataset, source.split), source)


def _numbers(dataset: Dataset, split: str) -> Iterator[int]:
    """Return the number of each row in its split before slicing, from 1."""
    lengths = {name: info.num_examples for name, info in (dataset.info.splits or {}).items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError:  # "all", or a dataset whose splits have no recorded length
        parts = []
    spans = [range(part.from_, part.to) for part in parts]
    # Each of several splits has a row 1, so their rows are counted through.
    if len({part.splitname for part in parts}) == 1 and sum(map(len, spans)) == len(dataset):
        return (index + 1 for index in chain.from_iterable(spans))
    return iter(range(1, len(dataset) + 1))


# ---- Streamed ----


def _streamed(source: Source) -> Iterator[Row]:
    parts = [_numbered_part(part, source) for part in re.split(r"\s*\+\s*", source.split)]
    through = count(1) if len({name for name, _, _ in parts}) > 1 else None
    for name, begin, end in parts:
        dataset = _load_streamed(source, name)
        if dataset is None:
            continue
        dataset = dataset.skip(begin) if begin else dataset
        dataset = dataset if end is None else dataset.take(max(end - begin, 0))
        yield from _numbered(dataset, through or count(begin + 1), source)


def _numbered_part(part: str, source: Source) -> tuple[str, int, int | None]:
    """Return the split's name, its first row and the row after its last, counted from 0; None means to the end."""
    match = NUMBERED_PART.fullmatch(part)
    if match is None:
        raise UserInputError(
            f"{split_key(source.key)}: machine.streaming needs row numbers from the start, as in 'train[:128]' or "
            f"'train[5:9]', got {source.split!r}. Write them, or turn machine.streaming off."
        )
    end = match["end"]
    return match["name"], int(match["begin"] or 0), int(end) if end else None


# ---- Both ----


def _load(source: Source, split: str) -> Dataset | None:
    """Download one split or slice; None if it takes no rows."""
    return cast("Dataset | None", _loaded(source, split, streaming=False))


def _load_streamed(source: Source, split: str) -> IterableDataset | None:
    """Open one split or slice for reading row by row; None if it takes no rows."""
    return cast("IterableDataset | None", _loaded(source, split, streaming=True))


def _loaded(source: Source, split: str, *, streaming: bool) -> object:
    try:
        return load_dataset(
            source.path,
            name=source.name,
            data_files=source.data_files,
            split=split,
            revision=source.revision,
            streaming=streaming,
        )
    except StopIteration:  # raised by `datasets` for a JSON file without rows
        return None
    except HUB_ERRORS as error:
        detail = first_line(error.__cause__ or error)
        # An empty slice, which callers report with the key to change.
        if "corresponds to no data" in detail:
            return None
        raise UserInputError(_refusal(source, detail)) from error


def _refusal(source: Source, detail: str) -> str:
    # Types of errors say little here; only the words tell the causes apart.
    if source.data_files is not None and ("Unable to find" in detail or "data file" in detail):
        return f"{source.key}: no file of the dataset {source.path!r} matches {source.data_files!r}. ({detail})"
    if "config name" in detail.lower() or "BuilderConfig" in detail:
        return f"{source.key}: {source.path!r} comes in several configurations. Name one with data.name. ({detail})"
    # "Bad split", "Unknown split", "Unrecognized instruction format"
    if "split" in detail.lower() or "instruction" in detail.lower():
        return f"{split_key(source.key)}: {source.split!r} does not fit {source.path!r}. ({detail})"
    return (
        f"{source.key}: the dataset {source.path!r} cannot be read from the Hub. Check its name and the network. "
        f"({detail})"
    )


def _numbered(dataset: Dataset | IterableDataset, numbers: Iterator[int], source: Source) -> Iterator[Row]:
    number = None
    try:
        # The rows come first: zip() asks them for one more at the end, and a number taken before that would be lost.
        for values, number in zip(dataset, numbers, strict=False):
            yield Row(number, f"row {number}", values)
    except HUB_ERRORS as error:
        where = "its first row" if number is None else f"the row after {number}"
        raise UserInputError(
            f"{source.key}: the dataset {source.path!r} cannot be read further from the Hub, at {where}. Check the "
            f"network, or the dataset's files. ({first_line(error.__cause__ or error)})"
        ) from error
