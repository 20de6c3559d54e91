"""Sequences on disk, written as they come and read by memory mapping: data may be larger than memory."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
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


STATE = "state.json"
# Raise it when the same rows would be prepared otherwise.
VERSION = 3


def cache_root() -> Path:
    """The folder of prepared data, beside what `datasets` keeps (``HF_DATASETS_CACHE``). Safe to delete."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "qlora_neft"


def fingerprint(parts: dict[str, Any]) -> str:
    """SHA-256 of plain values, and of the version of what prepares them."""
    text = json.dumps({"version": VERSION, "tokenizers": tokenizers.__version__, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of all that decides a tokenizer's output, whatever was padded or cut with it before."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        model.pop("padding", None)
        model.pop("truncation", None)
    else:
        model = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs)]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return fingerprint({"model": model, "special": special, "chat_template": tokenizer.chat_template})


def load_state(key: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder and the state of prepared data, None if there is none or it cannot be read."""
    folder = cache_root() / key
    try:
        return folder, json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def new_folder(key: str) -> Iterator[Path]:
    """A folder to prepare data in, removed again after an exception; see `keep`."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=root))
    except OSError:  # a cache that cannot be written to: prepare for this run alone
        folder = Path(tempfile.mkdtemp(prefix="qlora_neft-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def keep(folder: Path, key: str, state: dict[str, Any]) -> Path:
    """Give finished data its place in the cache, all at once.

    Returns:
        Where it is: in the cache, or where it was made if the cache cannot be written to.
    """
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    target = cache_root() / key
    if folder.parent != target.parent:
        return folder
    for _ in range(2):
        with contextlib.suppress(OSError):
            os.rename(folder, target)
            return target
        if load_state(key) is not None:  # another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            return target
        forget(key)  # what is there is no data
    return folder


def forget(key: str) -> None:
    """Remove data that turned out to be damaged."""
    shutil.rmtree(cache_root() / key, ignore_errors=True)
