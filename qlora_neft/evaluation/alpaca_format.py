"""AlpacaEval's files: instructions, outputs, annotations. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from .read_texts import read_rows
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
        first_line = str(error).strip().splitlines()[0]
        raise UserInputError(
            f"--instructions: AlpacaEval's instructions cannot be had from the Hub ({HUB_DATASET}, {HUB_FILE}). Give "
            f"a local JSON file of objects with an instruction. ({first_line})"
        ) from error
