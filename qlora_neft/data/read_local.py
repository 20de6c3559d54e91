"""The rows of one local file, one at a time.

Files are parsed here rather than by `datasets`, which turns a number among texts into text, takes the columns of the
first rows for all, and ends the process on a row that is ``null``.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..paths import TABLE_KINDS, data_kind
from ..recipe import data as recipe_data
from .arrow_files import arrow_batches, arrow_rows, parquet_file, parquet_rows
from .csv_files import csv_rows
from .lines import Line, filled, lines_of, text_of_line
from .sources import LocalFile, Row

DEEPEST_ROW = 100  # levels; Python cannot pass a row of many hundreds of levels to another process
ONE_A_LINE = "The file needs one object per line, or one array of objects."
# Names under which an object on a single line holds rows; under any other, such as ``messages``, it may be one row.
WRAPPERS = ("data", "rows", "examples", "records", "instances", "items", "samples", "train")
COLUMNS = frozenset(recipe_data.COLUMNS)


def file_rows(path: Path, key: str) -> Iterator[Row]:
    """Yield the rows of a file, numbered from 1; a row that cannot be read comes with its problem.

    Only JSON that is not line by line is held in memory as a whole.

    Raises:
        UserInputError: If the file cannot be read at all, is empty, or breaks off in the middle of a row.
    """
    file, kind, row = LocalFile(path, key), data_kind(path), None
    for row in {".csv": csv_rows, ".parquet": parquet_rows, ".arrow": arrow_rows}.get(kind or "", _json_rows)(file):
        yield row
    if row is None:
        needs = "row" if kind in (".csv", *TABLE_KINDS) else "JSON object"
        raise file.refused(f" is empty. It needs one {needs} per example.")


def count_rows(path: Path, key: str) -> int:
    """Count the rows that `file_rows` gives, without parsing the lines of a JSON file or the rows of a Parquet file.

    Raises:
        UserInputError: As `file_rows`.
    """
    file, kind, count = LocalFile(path, key), data_kind(path), 0
    if kind == ".parquet":
        with parquet_file(file) as parquet:
            count = parquet.metadata.num_rows
    elif kind == ".arrow":
        with arrow_batches(file) as (_, batches):
            count = sum(len(batch) for batch in batches)
    elif kind != ".csv":
        lines = filled(lines_of(file))
        begin = list(islice(lines, 2))
        count = 0 if _is_one_value(begin, file) else len(begin) + sum(1 for _ in lines)
    # Nothing counted: a CSV, JSON that is not line by line, or an empty file, which is refused there.
    return count or sum(1 for _ in file_rows(path, key))


def _json_rows(file: LocalFile) -> Iterator[Row]:
    """Read one object per line, an array of objects, or an object that holds such an array."""
    lines = filled(lines_of(file))
    begin = list(islice(lines, 2))
    if _is_one_value(begin, file):
        for number, value in enumerate(_entries(file, begin), 1):
            yield _json_row(number, f"entry {number}", value)
        return
    for number, line in enumerate(chain(begin, lines), 1):
        value, why = _parsed(text_of_line(line, file))
        place = f"line {line.number}"
        yield _json_row(number, place, value) if why is None else Row(number, place, None, f"is not JSON ({why})")


def _is_one_value(begin: Sequence[Line], file: LocalFile) -> bool:
    """Tell by the first two lines whether a file is one value of JSON, not one on every line."""
    if not begin or begin[0].raw.lstrip().startswith(b"["):
        return bool(begin)
    if not begin[0].raw.lstrip().startswith(b"{"):
        return False
    value, why = _parsed(text_of_line(begin[0], file))
    if why is None:  # a single line: a row, or rows under a name for them
        return len(begin) == 1 and isinstance(value, dict) and _rows_inside(value, WRAPPERS) is not None
    # An object over several lines: otherwise every line of it would be reported as a bad row.
    return data_kind(file.path) == ".json"


def _entries(file: LocalFile, begin: Sequence[Line]) -> list[Any]:
    text = _whole(file)
    value, why = _parsed(text)
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        name = _rows_inside(value, WRAPPERS if len(begin) == 1 else None)
        if name is not None:
            return value[name]
    if begin[0].raw.lstrip().startswith(b"{"):  # lines after all, or an object that holds no rows
        why = _parsed(text_of_line(begin[0], file))[1] or why
        raise file.refused(f", line {begin[0].number}, is not JSON ({why}). {ONE_A_LINE}")
    return _array(text, file)


def _rows_inside(value: dict[str, Any], names: Sequence[str] | None) -> str | None:
    """Return the name under which an object holds rows; None if it holds none, or is a row itself."""
    lists = [name for name, items in value.items() if isinstance(items, list) and items and isinstance(items[0], dict)]
    if len(lists) != 1 or not COLUMNS.isdisjoint(value):
        return None
    return lists[0] if names is None or lists[0] in names else None


def _json_row(number: int, place: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(number, place, None, "is nested too deep") if _is_too_deep(value) else Row(number, place, value)
    # reprlib, since a list may be nested deeper than repr() can go.
    shown = (value if isinstance(value, str) else reprlib.repr(value))[:40]
    problem = f"is {type(value).__name__} {shown!r}. Every example must be a JSON object with named fields"
    return Row(number, place, None, problem)


def _is_too_deep(row: dict[str, Any]) -> bool:
    # Level by level: recursion would fail on just the rows that are looked for.
    level: list[Any] = [row]
    for _ in range(DEEPEST_ROW):
        inner = chain.from_iterable(outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [value for value in inner if isinstance(value, (dict, list))]
        if not level:
            return False
    return True


def _parsed(text: str) -> tuple[Any, str | None]:
    """Return the value and None, or None and the reason why the text is not JSON."""
    try:
        return json.loads(text), None
    except (RecursionError, ValueError) as error:
        return None, _why(error)


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    # Python refuses whole numbers of more than 4300 digits.
    return "nested too deep" if isinstance(error, RecursionError) else "a number has too many digits"


def _whole(file: LocalFile) -> str:
    # From the beginning again: the lines read so far are gone, and only what is not line by line needs the whole text.
    return "".join(text_of_line(line, file) for line in lines_of(file))


def _array(text: str, file: LocalFile) -> list[Any]:
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        where = f", line {error.lineno}," if isinstance(error, json.JSONDecodeError) else ""
        raise file.refused(f"{where} is not JSON ({_why(error)}). {ONE_A_LINE}") from error
