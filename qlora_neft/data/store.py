"""Sequences on disk, written as they come and read by memory mapping: data may be larger than memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .encode import Encoded

COLUMNS = ("input_ids", "labels", "source", "row")
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("source", pa.int32()),  # which of the recipe's sources, from 0
        ("row", pa.int64()),  # which of its rows, from 1
    ]
)


class SequenceWriter:
    """Writes sequences into an Arrow stream, one record batch a call.

    Args:
        path: New file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._stream = pa.ipc.new_stream(str(path), _SCHEMA)

    def write(self, sequences: Sequence[Encoded], source: int, rows: Sequence[int]) -> None:
        """Append sequences, each with the number of the row it comes from."""
        if not sequences:
            return
        columns = [
            _lists([sequence.ids for sequence in sequences]),
            _lists([sequence.labels() for sequence in sequences]),
            pa.array(np.full(len(sequences), source, dtype=np.int32)),
            pa.array(np.asarray(rows, dtype=np.int64)),
        ]
        self._stream.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self.count += len(sequences)

    def close(self) -> None:
        """Finish the file."""
        self._stream.close()


def read_sequences(path: Path) -> Dataset:
    """The sequences of a file, memory mapped: columns ``input_ids``, ``labels``, ``source``, ``row``."""
    return Dataset.from_file(str(path))


def _lists(arrays: Sequence[np.ndarray]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
