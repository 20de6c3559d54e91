"""Outputs of a model as they lie on disk: AlpacaEval's JSON, JSON lines, or a text a line. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserInputError

FIELDS = ("output", "text", "completion", "response", "answer")


def read_rows(path: str | Path, key: str) -> list[Any]:
    """Entries of a JSON list or of JSON lines.

    Args:
        path: The file.
        key: What the caller wrote, for messages.

    Raises:
        UserInputError: If it cannot be read or is empty.
    """
    path, text = Path(path), read_text(path, key)
    rows = _lines(path, text, key) if path.suffix.lower() == ".jsonl" else _list(path, text, key)
    if not rows:
        raise UserInputError(f"{key}: {str(path)!r} is empty.")
    return rows


def read_texts(path: str | Path, key: str) -> list[str]:
    """The outputs in a file, in its order.

    A ``.json`` or ``.jsonl`` file holds objects with the output under ``output``, ``text``, ``completion``,
    ``response`` or ``answer`` (the first of these that it has), or strings; any other is text, an output a line.

    Raises:
        UserInputError: If the file cannot be read, is empty, or an entry has no output.
    """
    path = Path(path)
    if path.suffix.lower() not in (".json", ".jsonl"):
        text = read_text(path, key).removesuffix("\n")
        if not text:
            raise UserInputError(f"{key}: {str(path)!r} is empty.")
        return text.split("\n")
    return [_text(row, i, path, key) for i, row in enumerate(read_rows(path, key), 1)]


def read_text(path: Path, key: str) -> str:
    """A whole file.

    Raises:
        UserInputError: If it cannot be read.
    """
    if path.is_dir() or not path.exists():  # a pipe is neither a file nor a folder
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserInputError(f"{key}: must be a file, {str(path)!r} {found}.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(f"{key}: {str(path)!r} cannot be read ({error}).") from error


def _list(path: Path, text: str, key: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{key}: {str(path)!r} is no JSON ({error}).") from error
    if not isinstance(rows, list):
        raise UserInputError(f"{key}: {str(path)!r} must hold a JSON list, got {type(rows).__name__}.")
    return rows


def _lines(path: Path, text: str, key: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserInputError(f"{key}: {str(path)!r}, line {number} is no JSON ({error}).") from error
    return rows


def _text(row: Any, number: int, path: Path, key: str) -> str:
    if isinstance(row, str):
        return row
    field = next((name for name in FIELDS if name in row), None) if isinstance(row, dict) else None
    if field is None or not isinstance(row[field], str):
        raise UserInputError(
            f"{key}: {str(path)!r}, entry {number} must have its output, a text, under one of {', '.join(FIELDS)}."
        )
    return row[field]
