"""AlpacaEval's files: instructions, outputs, annotations. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserInputError, first_line
from ...files import write_json
from ..texts import read_rows
from .win_rate import LENGTH_CONTROLLED_NOTE, average_length, win_rate

HUB_DATASET, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval.json"  # 805 instructions, answered by text_davinci_003
DATASPLIT = "eval"


def read_instructions(path: str | Path | None) -> list[dict[str, Any]]:
    """Rows with an ``instruction`` each; an ``input`` is put under it, an empty line between.

    Args:
        path: JSON list or JSON lines; None for AlpacaEval's 805, from the Hub.

    Raises:
        UserInputError: If there are none, or two are the same.
    """
    file = _from_hub() if path is None else Path(path)
    rows = with_texts(read_rows(file, "--instructions"), ("instruction",), file, "--instructions")
    rows = [_joined(row) for row in rows]
    by_instruction(rows, file, "--instructions")
    return rows


def read_outputs(path: str | Path, key: str = "--outputs") -> list[dict[str, Any]]:
    """Rows with ``instruction`` and ``output``.

    Raises:
        UserInputError: If they have not.
    """
    return with_texts(read_rows(path, key), ("instruction", "output"), Path(path), key)


def read_annotations(path: str | Path) -> list[dict[str, Any]]:
    """Rows with ``instruction``, ``output_2`` and ``preference``, a number or null.

    Raises:
        UserInputError: If they have not.
    """
    rows = with_texts(read_rows(path, "--score"), ("instruction", "output_2"), Path(path), "--score")
    for number, row in enumerate(rows, 1):
        if "preference" not in row:
            raise UserInputError(f"--score: {str(path)!r}, entry {number} has no preference, the judge's verdict.")
        value = row["preference"]
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserInputError(
                f"--score: {str(path)!r}, entry {number}: preference must be a number or null, got {value!r}."
            )
    return rows


def score(annotations: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Win rate and length, under the names of AlpacaEval's leaderboards.

    Args:
        annotations: From `read_annotations`.
        outputs: What the lengths are of; by default what was annotated.

    Returns:
        What `win_rate.WinRate` has, ``avg_length``, ``not_annotated`` (outputs that no annotation is about) and
        ``length_controlled``, a note.

    Raises:
        UserInputError: If no output was annotated.
    """
    judged = {(row["instruction"], row["output_2"]) for row in annotations}
    texts = [row["output_2"] for row in annotations] if outputs is None else [row["output"] for row in outputs]
    others = 0 if outputs is None else sum((row["instruction"], row["output"]) not in judged for row in outputs)
    if outputs is not None and others == len(outputs):
        raise UserInputError("--outputs: none of these outputs is in the annotations. Give the file that was judged.")
    found = win_rate([row["preference"] for row in annotations])
    return {
        **found.to_dict(),
        "avg_length": average_length(texts),
        "not_annotated": others,
        "length_controlled": LENGTH_CONTROLLED_NOTE,
    }


def with_texts(rows: Sequence[Any], names: Sequence[str], path: Path, key: str) -> list[dict[str, Any]]:
    """Rows that are objects with a text in each of some fields; others are refused by their number."""
    for number, row in enumerate(rows, 1):
        for name in names:
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise UserInputError(f"{key}: {str(path)!r}, entry {number} must have {name}, a text.")
    return list(rows)


def _joined(row: dict[str, Any]) -> dict[str, Any]:
    more = row.get("input")
    return {**row, "instruction": f"{row['instruction']}\n\n{more}"} if isinstance(more, str) and more else row


def by_instruction(rows: Sequence[dict[str, Any]], path: Path, key: str) -> dict[str, dict[str, Any]]:
    """Rows by their instruction; the same twice is refused."""
    found = {row["instruction"]: row for row in rows}
    if len(found) < len(rows):
        raise UserInputError(f"{key}: {str(path)!r} has {len(rows) - len(found)} instructions twice; each must differ.")
    return found


def _from_hub() -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset"))
    except (OSError, HTTPError) as error:
        raise UserInputError(
            f"--instructions: AlpacaEval's instructions cannot be had from the Hub ({HUB_DATASET}, {HUB_FILE}). Give "
            f"a local JSON file of objects with an instruction. ({first_line(error)})"
        ) from error


class RowsFile:
    """Rows by instruction, kept in a file that is written whole or not at all.

    Args:
        path: The file; what is in it already is kept.
        key: What the caller wrote, for messages.
        order: Instructions, in the order of the file; rows of others come last.
        made_by: What each row says of its making, by field; a file of another making is refused.
        named: Further fields that every row is given.

    Attributes:
        rows: By instruction.

    Raises:
        UserInputError: If the file is no such list, or its rows were made otherwise.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        order: Sequence[str],
        made_by: dict[str, Any],
        named: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.key, self.order, self.made_by, self.named = path, key, list(order), made_by, named or {}
        if not path.parent.is_dir():
            raise UserInputError(f"{key}: there is no folder {str(path.parent)!r}.")
        stored = with_texts(read_rows(path, key), ("instruction",), path, key) if path.exists() else []
        for row in stored:
            self._check(row)
        self.rows = by_instruction(stored, path, key)

    def missing(self) -> list[str]:
        """Instructions without a row, in order."""
        return [name for name in self.order if name not in self.rows]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep rows and write the file."""
        self.rows |= {row["instruction"]: row for row in rows}
        self.rows = {name: {**row, **self.named, **self.made_by} for name, row in self.rows.items()}
        write_json(self.path, self.ordered() + self._others())

    def ordered(self) -> list[dict[str, Any]]:
        """The rows asked for, in order."""
        return [self.rows[name] for name in self.order if name in self.rows]

    def _others(self) -> list[dict[str, Any]]:
        asked = set(self.order)
        return [row for name, row in self.rows.items() if name not in asked]

    def _check(self, row: dict[str, Any]) -> None:
        differing = [
            _difference(name, row.get(name), now) for name, now in self.made_by.items() if row.get(name) != now
        ]
        if differing:
            raise UserInputError(
                f"{self.key}: {str(self.path)!r} holds rows made otherwise: {'; '.join(differing)}. Give another file, "
                "or delete this one."
            )


def _difference(name: str, was: Any, now: Any) -> str:
    """What differs; of texts that hold a JSON object, its keys."""
    try:
        old, new = json.loads(was), json.loads(now)
    except (TypeError, ValueError):
        old = new = None
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{name} was {was!r}, is now {now!r}"
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {old.get(key)!r}, is now {new.get(key)!r}" for key in keys)
