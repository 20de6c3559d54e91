"""A JSON list on disk that grows while it is made, so that a killed command loses little. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from ..files.json_file import write_json
from .alpaca_format import by_instruction, with_texts
from .read_texts import read_rows


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
