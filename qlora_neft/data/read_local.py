"""The rows of one local file, one at a time.

Files are parsed here rather than by `datasets`, which turns a number among texts into text, takes the columns of the
first rows for all, and ends the process on a row that is ``null``.
"""

from __future__ import annotations

import csv
import json
import reprlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserInputError
from .sources import LocalFile, Row

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST_CSV_FIELD = 2**24  # characters; a quote that is never closed must not swallow the rest of the file
PARQUET_ROWS = 256  # held in memory at a time
DEEPEST_ROW = 100  # levels; Python cannot pass a row of many hundreds of levels to another process
ONE_A_LINE = "The file needs one object per line, or one array of objects."
QUOTING = "A field that holds a comma, a quote or a line end stands in double quotes, and quotes in it are doubled."


class Line(NamedTuple):
    """A line of a file: its number from 1, the bytes before it, and its own bytes with the line end."""

    number: int
    offset: int
    raw: bytes


def file_rows(path: Path, key: str) -> Iterator[Row]:
    """Yield the rows of a file, numbered from 1; a row that cannot be read comes with its problem.

    Only a JSON array is held in memory as a whole.

    Raises:
        UserInputError: If the file cannot be read at all, is empty, or breaks off in the middle of a row.
    """
    file, kind, row = LocalFile(path, key), path.suffix.lower(), None
    for row in {".csv": _csv_rows, ".parquet": _parquet_rows}.get(kind, _json_rows)(file):
        yield row
    if row is None:
        needs = "row" if kind in (".csv", ".parquet") else "JSON object"
        raise file.refused(f" is empty. It needs one {needs} per example.")


def count_rows(path: Path, key: str) -> int:
    """Count the rows that `file_rows` gives, without parsing the lines of a JSON file or the rows of a Parquet file.

    Raises:
        UserInputError: As `file_rows`.
    """
    file, kind, count = LocalFile(path, key), path.suffix.lower(), 0
    if kind == ".parquet":
        with _parquet(file) as parquet:
            count = parquet.metadata.num_rows
    elif kind != ".csv":
        lines = _filled(_lines(file))
        first = next(lines, None)
        count = 0 if first is None or _opens_array(first) else 1 + sum(1 for _ in lines)
    # Nothing counted: a CSV, a JSON array, or an empty file, which is refused there.
    return count or sum(1 for _ in file_rows(path, key))


def _lines(file: LocalFile) -> Iterator[Line]:
    """Yield lines, ended by a line feed only: JSON allows U+2028 and the like inside a text."""
    offset = 0
    try:
        with file.path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                mark = len(BYTE_ORDER_MARK) if number == 1 and raw.startswith(BYTE_ORDER_MARK) else 0
                yield Line(number, offset + mark, raw[mark:])
                offset += len(raw)
    except OSError as error:
        raise file.refused(f" cannot be read. ({error.strerror})") from error


def _filled(lines: Iterator[Line]) -> Iterator[Line]:
    return (line for line in lines if line.raw.strip())


def _text(line: Line, file: LocalFile) -> str:
    try:
        return line.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line.offset + error.start + 1
        raise file.refused(f" is not UTF-8 text, byte {byte} is not. Save it as UTF-8. (line {line.number})") from error


def _json_rows(file: LocalFile) -> Iterator[Row]:
    """Read a JSON array of objects, or one object per line."""
    lines = _filled(_lines(file))
    first = next(lines, None)
    if first is None:
        return
    if _opens_array(first):
        for number, value in enumerate(_array(file), 1):
            yield _json_row(number, f"entry {number}", value)
        return
    for number, line in enumerate(chain([first], lines), 1):
        value, why = _parsed(_text(line, file))
        place = f"line {line.number}"
        if why is None:
            yield _json_row(number, place, value)
            continue
        # An object over several lines: otherwise every line of it would be reported as a bad row.
        if line is first and file.path.suffix.lower() == ".json" and line.raw.lstrip().startswith(b"{"):
            raise _not_lines(file, place, why)
        yield Row(number, place, None, f"is not JSON ({why})")


def _opens_array(line: Line) -> bool:
    return line.raw.lstrip().startswith(b"[")


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
    # From the beginning again: the lines read so far are gone, and only an array needs the whole text.
    return "".join(_text(line, file) for line in _lines(file))


def _array(file: LocalFile) -> list[Any]:
    text = _whole(file)
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        where = f", line {error.lineno}," if isinstance(error, json.JSONDecodeError) else ""
        raise file.refused(f"{where} is not JSON ({_why(error)}). {ONE_A_LINE}") from error


def _not_lines(file: LocalFile, place: str, why: str) -> UserInputError:
    """Return the error for a file that may be a single object, with its rows under one of the keys."""
    value, _ = _parsed(_whole(file))
    fields = value if isinstance(value, dict) else {}
    lists = [name for name, items in fields.items() if isinstance(items, list) and items and isinstance(items[0], dict)]
    if len(lists) == 1:
        return file.refused(
            f" is one object over several lines, not rows. If its list {lists[0]!r} holds the examples, save that "
            f"list as the file. {ONE_A_LINE}"
        )
    return file.refused(f", {place}, is not JSON ({why}). {ONE_A_LINE}")


def _csv_rows(file: LocalFile) -> Iterator[Row]:
    """Read CSV. Every field is text: ``NA`` stays ``NA``, and ``007`` stays ``007``."""
    records = _records(file)
    names = _column_names(next(records, None), file)
    for number, (line, fields) in enumerate(records, 1):
        problem = None
        # csv.DictReader would fill in missing fields, and collect extra ones under None.
        if len(fields) != len(names):
            problem = f"has {len(fields)} fields where the header names {len(names)}. Quote a field that holds a comma"
        elif any("\0" in field for field in fields):
            problem = "holds a NUL byte. Save the file as UTF-8 text"
        values = None if problem else dict(zip(names, fields, strict=True))
        yield Row(number, f"line {line}", values, problem)


def _records(file: LocalFile) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the line it begins on, skipping blank lines."""
    # Strict: otherwise wrong quoting is guessed at, and fields move into other columns.
    reader = csv.reader((_text(line, file) for line in _lines(file)), strict=True)
    while True:
        # A quoted field may hold line ends, so a record's line is not its number.
        begin = reader.line_num + 1
        limit = csv.field_size_limit(LONGEST_CSV_FIELD)  # process-wide, so changed only for as long as it takes
        try:
            fields = next(reader, None)
        except csv.Error as error:
            # The next line may be the middle of a field, so no later row can be trusted.
            raise file.refused(f", line {begin}, is not CSV ({error}). {QUOTING}") from error
        finally:
            csv.field_size_limit(limit)
        if fields is None:
            return
        if fields:
            yield begin, fields


def _column_names(header: tuple[int, list[str]] | None, file: LocalFile) -> list[str]:
    if header is None:
        return []
    line, names = header
    twice = next((name for name in names if names.count(name) > 1), None)
    # Mostly UTF-16: without a byte order mark, its Latin letters read as UTF-8 with NULs between them.
    if any("\0" in name for name in names):
        fault = "holds a NUL byte. Save the file as UTF-8 text."
    elif not all(name.strip() for name in names):
        nth = [not name.strip() for name in names].index(True) + 1
        fault = f"has no name for column {nth}. Name every column; from pandas, write with index=False."
    elif twice is not None:
        fault = f"names the column {twice!r} twice. Give each its own name."
    # Spreadsheets separate by semicolons where the comma is the decimal mark.
    elif len(names) == 1 and {";", "\t"} & set(names[0]):
        fault = f"names the one column {names[0]!r}. Separate columns by commas."
    else:
        return names
    raise file.refused(f", line {line}, the header, {fault}")


def _parquet_rows(file: LocalFile) -> Iterator[Row]:
    number = 0
    with _parquet(file) as parquet:
        names = parquet.schema_arrow.names
        # A row is a dictionary, which would keep the last of them.
        if len(set(names)) < len(names):
            raise file.refused(" names a column twice. Give each its own name.")
        for batch in parquet.iter_batches(batch_size=PARQUET_ROWS):
            for values in batch.to_pylist():
                number += 1
                yield Row(number, f"row {number}", values)


@contextmanager
def _parquet(file: LocalFile) -> Generator[pq.ParquetFile, None, None]:
    try:
        # Without a buffer, a whole row group would be read at once.
        with pq.ParquetFile(file.path, buffer_size=2**20) as parquet:
            yield parquet
    except UserInputError:  # which is a ValueError too
        raise
    except (pa.ArrowException, OSError, ValueError, ArithmeticError) as error:
        detail = str(error).strip().partition("\n")[0]
        raise file.refused(f" cannot be read as Parquet. Check that it is whole. ({detail})") from error
