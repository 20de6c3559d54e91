"""Prepared data on disk: sequences written as they come and read by memory mapping, and the cache that keeps them.

Data may therefore be larger than memory.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path

import datasets.config
import numpy as np
import pyarrow as pa
from datasets import Dataset
from typing_extensions import TypedDict

from ..files import SEAL, is_whole, new_held, put_folder, read_json, sealed, sha256_of_file, sweep, write_json
from ..steps import LOSS_WEIGHTS
from .encode import Encoded

STATE = "state.json"
PREFIX = "qlora_neft-"  # of folders outside the cache
# The keys that decide how a row becomes sequences. With the sources they make the cache key: the other keys of the
# section only say what the gate lets through, and changing them prepares nothing again.
SEQUENCE_KEYS = (
    "chat_template_kwargs",
    "max_length",
    "max_prompt_length",
    "max_response_length",
    "train_on",
    "prompt_loss_weight",
    "train_on_prompt",
    "keep_end_token",
    "split_conversations",
    "split_text",
)
COLUMNS = ("input_ids", "labels", "source", "row")  # and loss_weights, where a token counts for less than 1
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("source", pa.int32()),  # which of the recipe's sources, from 0
        ("row", pa.int64()),  # which of its rows, from 1
    ]
)
_WEIGHTED = _SCHEMA.append(pa.field(LOSS_WEIGHTS, pa.list_(pa.float32())))


class SourceFacts(TypedDict):
    """Facts about one source.

    ``end`` is the text of the token that ends a response in its template, ``end_of_call`` that of a call,
    ``lacks_begin`` the begin token that its template file does not write and the tokenizer puts before a text;
    ``columns_not_used`` and ``keys_not_used`` are columns, and keys of messages, that no row is read from. ``shape`` is
    a data set whose columns these are, None if they have the format's own names.
    """

    path: str
    rows: int
    format: str
    prompt_template: str
    weight: float
    end: str | None
    end_of_call: str | None
    lacks_begin: str | None
    shape: str | None
    columns_not_used: list[str]
    keys_not_used: list[str]


class FindingRecord(TypedDict):
    """A `Finding` as stored."""

    count: int
    places: list[str]


class TallyRecord(TypedDict):
    """A `Tally` as stored; keys as its attributes."""

    rows: int
    sequences: int
    tokens: int
    trained_tokens: int
    ended: int
    truncated_sequences: int
    texts_split: int
    chunks: int
    turns_left_out: int
    largest_token_id: int
    findings: dict[str, FindingRecord]


class State(TypedDict):
    """Everything known of prepared data but its sequences: the content of ``state.json``.

    The hashes are of what the rows say, and of the tokens they became. ``overlap`` counts the held-out rows that are
    training rows as well, ``near`` those that begin with a training row's request and go on otherwise.
    """

    train: TallyRecord
    train_sha256: str
    train_tokens_sha256: str
    eval: TallyRecord | None
    eval_sha256: str | None
    eval_tokens_sha256: str | None
    sources: list[SourceFacts]
    eval_sources: list[SourceFacts]
    overlap: int
    near: int
    stop_token_ids: list[int]
    eos_token: str


# ---- Sequences ----


class SequenceWriter:
    """Writes sequences into an Arrow stream, one record batch per call.

    Args:
        path: The file to create.
        weighted: Whether the sequences have weights.
    """

    def __init__(self, path: Path, *, weighted: bool = False) -> None:
        self.path, self.count = path, 0
        self._schema = _WEIGHTED if weighted else _SCHEMA
        self._stream = pa.ipc.new_stream(str(path), self._schema)

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
        if self._schema is _WEIGHTED:
            columns.append(_lists([sequence.loss_weights() for sequence in sequences]))
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema))
        self.count += len(sequences)

    def close(self) -> None:
        """Finish the file."""
        self._stream.close()


def read_sequences(path: Path) -> Dataset:
    """Return the sequences of a file, memory mapped, with `COLUMNS`."""
    return Dataset.from_file(str(path))


def _lists(arrays: Sequence[np.ndarray]) -> pa.Array:
    # Offsets (N + 1,) into the tokens of all sequences, joined. int32 holds them: a batch is a chunk of rows.
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


# ---- The cache ----

_held_to_the_end = contextlib.ExitStack()


def cache_root() -> Path:
    """Return the folder of prepared data, inside the cache of `datasets` (``HF_DATASETS_CACHE``). Safe to delete."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "qlora_neft"


def load_state(key: str) -> tuple[Path, State] | None:
    """Return the folder and the state of prepared data, None if there is none or it is damaged.

    Every file is hashed, about half a second for a gigabyte: a page that a power cut left as zeros reads as tokens like
    any other.
    """
    folder = cache_root() / key
    try:
        content = read_json(folder / STATE)
        if not isinstance(content, dict) or SEAL not in content or not is_whole(content):
            return None
        if any(sha256_of_file(folder / name) != sha256 for name, sha256 in content["files"].items()):
            return None
        return folder, content["state"]
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return None


@contextlib.contextmanager
def new_folder(key: str) -> Generator[Path, None, None]:
    """Yield a folder to prepare data in, for `keep`; remove it after an exception, and what killed ones left."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        sweep(_unfinished(root))
        # Inside the cache, so that `keep` can rename it: a rename is atomic within one file system.
        folder = root / f".{key[:16]}-{secrets.token_hex(8)}"
        holding = contextlib.ExitStack()
        holding.enter_context(new_held(folder))
    except OSError:  # the cache is not writable: prepare for this run alone
        sweep(_unfinished(Path(tempfile.gettempdir())))
        folder = Path(tempfile.gettempdir(), f"{PREFIX}{secrets.token_hex(8)}")
        holding = _held_to_the_end  # this run reads it as long as it lives
        holding.enter_context(new_held(folder))
        folder.chmod(0o700)  # others may look into the temporary folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if holding is not _held_to_the_end:
            holding.close()


def _unfinished(root: Path) -> list[Path]:
    """Return the folders in which data is, or was, being prepared."""
    pattern = re.compile(rf"(\.[0-9a-f]{{16}}-|\.[0-9a-f]{{64}}\.replaced-|{PREFIX}).+")
    return [path for path in root.iterdir() if pattern.fullmatch(path.name)]


def keep(folder: Path, key: str, state: State) -> Path:
    """Move finished data to its place in the cache, atomically.

    Returns:
        Where the data is: in the cache, or still in ``folder`` if the cache is not writable.
    """
    files = {path.name: sha256_of_file(path) for path in sorted(folder.iterdir())}
    write_json(folder / STATE, sealed({"files": files, "state": state}))
    target = cache_root() / key
    if folder.parent != target.parent:
        return folder
    with contextlib.suppress(OSError):
        # Fails if the name is taken, by another process's result or by damaged data.
        os.rename(folder, target)
        return target
    if load_state(key) is not None:  # another process was faster
        shutil.rmtree(folder, ignore_errors=True)
        return target
    with contextlib.suppress(OSError):
        put_folder(folder, target)  # what is there is unusable
        return target
    return folder


def forget(key: str) -> None:
    """Remove damaged data from the cache."""
    shutil.rmtree(cache_root() / key, ignore_errors=True)
