"""Prepared data on disk: sequences written as they come and read by memory mapping, and the cache that keeps them.

Data may therefore be larger than memory.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import datasets.config
import numpy as np
import pyarrow as pa
import tokenizers
from datasets import Dataset

from ..files import put_folder, read_json, sha256_of_text
from ..steps import LOSS_WEIGHTS
from .encode import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE = "state.json"
VERSION = 4  # of the preparation; raise it when the same rows would give other sequences
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
    """Facts about one source; ``end`` is the text of the token that ends a response in its template."""

    path: str
    rows: int
    format: str
    prompt_template: str
    weight: float
    end: str | None


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

    ``overlap`` counts the held-out rows that are training rows as well.
    """

    train: TallyRecord
    train_sha256: str
    eval: TallyRecord | None
    eval_sha256: str | None
    sources: list[SourceFacts]
    eval_sources: list[SourceFacts]
    overlap: int
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


def cache_root() -> Path:
    """Return the folder of prepared data, inside the cache of `datasets` (``HF_DATASETS_CACHE``). Safe to delete."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "qlora_neft"


def fingerprint(parts: dict[str, Any]) -> str:
    """Return the SHA-256 of plain values and of the versions of what prepares them, as hex."""
    # Another version of tokenizers may cut the same text into other tokens.
    text = json.dumps({"version": VERSION, "tokenizers": tokenizers.__version__, **parts}, sort_keys=True, default=str)
    return sha256_of_text(text)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of all that decides a tokenizer's output, as hex."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        # State, not settings: what the tokenizer was last asked to pad or cut.
        model.pop("padding", None)
        model.pop("truncation", None)
    else:
        model = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs)]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return fingerprint({"model": model, "special": special, "chat_template": tokenizer.chat_template})


def load_state(key: str) -> tuple[Path, State] | None:
    """Return the folder and the state of prepared data, None if there is none or it cannot be read."""
    folder = cache_root() / key
    try:
        return folder, read_json(folder / STATE)
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def new_folder(key: str) -> Generator[Path, None, None]:
    """Yield a folder to prepare data in, for `keep`; remove it after an exception."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that `keep` can rename it: a rename is atomic within one file system.
        folder = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=root))
    except OSError:  # the cache is not writable: prepare for this run alone
        folder = Path(tempfile.mkdtemp(prefix="qlora_neft-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def keep(folder: Path, key: str, state: State) -> Path:
    """Move finished data to its place in the cache, atomically.

    Returns:
        Where the data is: in the cache, or still in ``folder`` if the cache is not writable.
    """
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
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
