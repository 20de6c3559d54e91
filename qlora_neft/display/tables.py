"""Tables of plain text, for a terminal, a pipe or a docs page. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path


def plain_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first to the left, the others, numbers, to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(heading, *rows, strict=True)]
    return "\n".join(_line(row, widths) for row in (heading, *rows))


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same in Markdown."""
    marks = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, marks, *rows))


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths without the folders at their beginning, and the names at their end, that all of them share."""
    parts = [Path(path).parts for path in paths]
    if len(set(parts)) < 2:
        return list(paths)
    begin = next(i for i, level in enumerate(zip_longest(*parts)) if len(set(level)) > 1)
    end = next(i for i, level in enumerate(zip_longest(*(part[::-1] for part in parts))) if len(set(level)) > 1)
    short = ["/".join(part[begin : len(part) - end]) for part in parts]
    return short if all(short) and len(set(short)) == len(paths) else list(paths)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines, their columns aligned; the same on a terminal and in a pipe."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
