"""The rows of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from .lines import lines_of, text_of_line
from .sources import LocalFile, Row

LONGEST_CSV_FIELD = 2**24  # characters; a quote that is never closed must not swallow the rest of the file
QUOTING = "A field that holds a comma, a quote or a line end stands in double quotes, and quotes in it are doubled."


def csv_rows(file: LocalFile) -> Iterator[Row]:
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
    reader = csv.reader((text_of_line(line, file) for line in lines_of(file)), strict=True)
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
    line, names = header[0], [name.strip() for name in header[1]]
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
