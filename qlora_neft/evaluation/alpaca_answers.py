"""A model's answers to AlpacaEval's instructions, in the official format; what was answered is not answered again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ..decoding import Decoding
from ..files.file_hash import sha256_of_file
from ..trained import AdapterFolder, Trained
from ..trained.folder import WEIGHTS
from .alpaca_format import DATASPLIT
from .rows_file import RowsFile

T = TypeVar("T")


def answers_file(
    path: Path,
    folder: AdapterFolder,
    instructions: Sequence[dict[str, Any]],
    *,
    generator: str,
    decoding: Decoding,
    meta_prompt: str = "",
) -> RowsFile:
    """The file of an adapter's answers, with those that are there already. Nothing is loaded.

    Raises:
        UserInputError: If the file holds answers of another adapter or of other settings.
    """
    digest = sha256_of_file(folder.path / WEIGHTS)
    base = {"base": folder.own_base} if folder.own_base else {}
    asked = {"meta_prompt": meta_prompt} if meta_prompt else {}
    metadata = json.dumps({"adapter_sha256": digest, **base, **asked, **asdict(decoding)}, sort_keys=True)
    order = [row["instruction"] for row in instructions]
    return RowsFile(path, "--output", order, {"metadata": metadata}, {"generator": generator})


def answer(
    trained: Trained,
    file: RowsFile,
    instructions: Sequence[dict[str, Any]],
    decoding: Decoding,
    *,
    meta_prompt: str = "",
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Answer what is missing; the file is written after each batch.

    Args:
        trained: The model.
        file: From `answers_file`.
        instructions: What is asked; further fields (``dataset``) are kept.
        decoding: How tokens are chosen.
        meta_prompt: Put behind every instruction.
        batch_size: Prompts at a time.
        progress: Told how many are answered, of how many.

    Returns:
        Instructions that fill the model's context; their output is empty.
    """
    asked = set(file.missing())
    rows = [row for row in instructions if row["instruction"] in asked]
    texts = [f"{row['instruction']} {meta_prompt}" if meta_prompt else row["instruction"] for row in rows]
    prompts = [trained.prompts.ids([{"role": "user", "content": text}]) for text in texts]
    for batch in _batches(trained.texts(prompts, decoding, batch_size=batch_size), batch_size):
        file.add([_row(rows[i], text) for i, text in batch])
        progress(len(file.order) - len(file.missing()), len(file.order))
    too_long = file.missing()
    if too_long:
        file.add([_row(row, "") for row in rows if row["instruction"] in set(too_long)])
    return too_long


def _row(asked: dict[str, Any], output: str) -> dict[str, Any]:
    return {
        "instruction": asked["instruction"],
        "output": output,
        "generator": None,  # the file's
        "dataset": asked.get("dataset", "custom"),
        "datasplit": asked.get("datasplit", DATASPLIT),
    }


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
