"""One table, for a terminal, a pipe, a Markdown file or a page. No torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from .markdown import cell
from .terminal import printable, shown

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Cells of text in rows and columns.

    Attributes:
        columns: Column names; empty for a table without a heading.
        rows: Cells, one per column.
        title: Heading of `rich` and of pages; `plain` and `markdown` leave it to the caller.
        align: ``l`` or ``r`` per column, the last letter repeated: labels to the left, numbers to the right.
        sections: Indices of the rows that `rich` draws a rule below.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    align: str = "lr"
    sections: Collection[int] = ()

    def plain(self) -> str:
        """Return lines with aligned columns, the same on a terminal and in a pipe."""
        lines = [[printable(text) for text in line] for line in (*([self.columns] if self.columns else []), *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        sides = self._sides(len(widths))
        return "\n".join("  ".join(map(_padded, line, widths, sides)).rstrip() for line in lines)

    def markdown(self, *, aligned: bool = False) -> str:
        """Return a Markdown table without the title. Cells are escaped: no bar, line end or link breaks out of one.

        Args:
            aligned: Mark right-aligned columns as such; without it every column is left to the reader's program.
        """
        marks = ["---:" if aligned and side == "r" else "---" for side in self._sides(len(self.columns))]
        heading, *rows = ["| " + " | ".join(map(cell, line)) + " |" for line in (self.columns, *self.rows)]
        return "\n".join([heading, "| " + " | ".join(marks) + " |", *rows])

    def rich(self, *, framed: bool = True) -> RichTable:
        """Return a table for a rich console, which wraps it to the console's width; markup in cells is not obeyed.

        Args:
            framed: Draw a frame. Without one, long words are folded and not shortened, for cells with paths.
        """
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        if framed:
            title, table = Text(self.title, style="table.title"), RichTable(title_justify="left")
        else:
            title, table = Text(self.title), RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
            table.title_justify = "left"
        table.title = title if self.title else None
        for name, side in zip(self.columns, self._sides(len(self.columns)), strict=True):
            justify = "right" if side == "r" else "left"
            table.add_column(Text(shown(name)), justify=justify, overflow="ellipsis" if framed else "fold")
        for i, row in enumerate(self.rows):
            table.add_row(*(Text(shown(text)) for text in row), end_section=i in self.sections)
        return table

    def _sides(self, count: int) -> str:
        return self.align[:count].ljust(count, self.align[-1])


def short_names(paths: Sequence[str]) -> list[str]:
    """Drop the leading folders and the trailing names that all paths share.

    Returns:
        One name per path; the paths as they are where the short ones would be empty or not unique.
    """
    parts = [Path(path).parts for path in paths]
    if len(set(parts)) < 2:
        return list(paths)
    begin = next(i for i, level in enumerate(zip_longest(*parts)) if len(set(level)) > 1)
    end = next(i for i, level in enumerate(zip_longest(*(part[::-1] for part in parts))) if len(set(level)) > 1)
    short = ["/".join(part[begin : len(part) - end]) for part in parts]
    return short if all(short) and len(set(short)) == len(paths) else list(paths)


def _padded(cell: str, width: int, side: str) -> str:
    return cell.rjust(width) if side == "r" else cell.ljust(width)
