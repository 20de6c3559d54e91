"""Files of text, compressed or not: as a stream of bytes, and line by line."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

import pyarrow as pa

from .sources import LocalFile

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What the readers raise for a file that is not whole, or not compressed at all; gzip's is an OSError.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


@contextmanager
def opened(file: LocalFile) -> Generator[IO[bytes], None, None]:
    """Yield a file's bytes, decompressed.

    Raises:
        UserInputError: If it cannot be read; also from inside the block, where it is read.
    """
    packed = file.path.suffix.lower()
    try:
        with _stream(file.path, packed) as stream:
            yield stream
    except (OSError, *DAMAGED) as error:
        # Errors of the system have a number, those of a compressed file's content have none.
        if isinstance(error, OSError) and error.strerror is not None:
            raise file.refused(f" cannot be read. ({error.strerror})") from error
        detail = str(error).partition("\n")[0]
        raise file.refused(f" cannot be decompressed as {packed}. Check that it is whole. ({detail})") from error


def _stream(path: Path, packed: str) -> IO[bytes]:
    match packed:
        case ".gz":
            return cast("IO[bytes]", gzip.open(path, "rb"))
        case ".bz2":
            return bz2.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            # Arrow has the codec, so that no package more is needed; before Python 3.14 there is none of its own.
            stream = pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd")
            return cast("IO[bytes]", io.BufferedReader(cast("io.RawIOBase", stream), 2**20))
    return path.open("rb")


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
