"""The rows of a Parquet or an Arrow file, a few at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserInputError
from .sources import LocalFile, Row

ROWS_AT_ONCE = 256  # held in memory
ARROW_MAGIC = b"ARROW1"


def parquet_rows(file: LocalFile) -> Iterator[Row]:
    """Read Parquet."""
    with parquet_file(file) as parquet:
        _check_names(parquet.schema_arrow.names, file)
        yield from _rows(parquet.iter_batches(batch_size=ROWS_AT_ONCE))


def arrow_rows(file: LocalFile) -> Iterator[Row]:
    """Read an Arrow file, in either of its forms: `datasets` writes streams."""
    with arrow_batches(file) as (schema, batches):
        _check_names(schema.names, file)
        # A slice at a time: one batch may hold any number of rows, and as Python's values they take far more memory.
        slices = (batch.slice(begin, ROWS_AT_ONCE) for batch in batches for begin in range(0, len(batch), ROWS_AT_ONCE))
        yield from _rows(slices)


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield Row(number, f"row {number}", values)


def _check_names(names: Sequence[str], file: LocalFile) -> None:
    # A row is a dictionary, which would keep the last of them.
    if len(set(names)) < len(names):
        raise file.refused(" names a column twice. Give each its own name.")


@contextmanager
def arrow_batches(file: LocalFile) -> Generator[tuple[pa.Schema, Iterator[pa.RecordBatch]], None, None]:
    """Yield the schema and the batches of an Arrow file, memory mapped.

    Raises:
        UserInputError: If it cannot be read as Arrow; also from inside the block, where it is read.
    """
    with _refused(file, "Arrow"), pa.memory_map(str(file.path)) as source:
        # The file's form begins with these letters; the stream's does not.
        if source.read(len(ARROW_MAGIC)) == ARROW_MAGIC:
            reader = pa.ipc.open_file(source)
            yield reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            source.seek(0)
            stream = pa.ipc.open_stream(source)
            yield stream.schema, iter(stream)


@contextmanager
def parquet_file(file: LocalFile) -> Generator[pq.ParquetFile, None, None]:
    """Yield a Parquet file.

    Raises:
        UserInputError: If it cannot be read as Parquet; also from inside the block, where it is read.
    """
    # Without a buffer, a whole row group would be read at once.
    with _refused(file, "Parquet"), pq.ParquetFile(file.path, buffer_size=2**20) as parquet:
        yield parquet


@contextmanager
def _refused(file: LocalFile, kind: str) -> Generator[None, None, None]:
    try:
        yield
    except UserInputError:  # which is a ValueError too
        raise
    except (pa.ArrowException, OSError, ValueError, ArithmeticError) as error:
        detail = str(error).strip().partition("\n")[0]
        raise file.refused(f" cannot be read as {kind}. Check that it is whole. ({detail})") from error
