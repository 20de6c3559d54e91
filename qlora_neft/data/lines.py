"""The lines of a file of text, compressed or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .compressed import opened
from .sources import LocalFile

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line of a file: its number from 1, the bytes before it, and its own bytes with the line end."""

    number: int
    offset: int
    raw: bytes


def lines_of(file: LocalFile) -> Iterator[Line]:
    """Yield lines, ended by a line feed only: JSON allows U+2028 and the like inside a text."""
    offset = 0
    with opened(file) as stream:
        for number, raw in enumerate(stream, 1):
            mark = len(BYTE_ORDER_MARK) if number == 1 and raw.startswith(BYTE_ORDER_MARK) else 0
            yield Line(number, offset + mark, raw[mark:])
            offset += len(raw)


def filled(lines: Iterator[Line]) -> Iterator[Line]:
    """Leave out blank lines."""
    return (line for line in lines if line.raw.strip())


def text_of_line(line: Line, file: LocalFile) -> str:
    """Return a line as text.

    Raises:
        UserInputError: If it is not UTF-8.
    """
    try:
        return line.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line.offset + error.start + 1
        raise file.refused(f" is not UTF-8 text, byte {byte} is not. Save it as UTF-8. (line {line.number})") from error
