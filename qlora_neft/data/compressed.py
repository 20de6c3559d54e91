"""Files of text, compressed or not, as a stream of bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from .sources import LocalFile

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
