"""Answers that an interrupted command has written: found again by the same command, which goes on behind them.

Beside the hidden draft of the answers lies a list: in its first line what they were made with, then for each answer
where it ends. The draft is cut at the last whole batch, so that what follows is answered in the batches it would have
been in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from ..files import sha256_of_text


class Begun:
    """What is there of a file of answers.

    Args:
        path: The file to write.
        made: What its answers are made with: JSON values by name.
        batch_size: Prompts at a time.

    Attributes:
        count: Number of answers that are there, whole batches.

    Raises:
        UserInputError: If there are answers that were made with something else.
    """

    def __init__(self, path: Path, made: Mapping[str, Any], batch_size: int) -> None:
        self.draft, self.list = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.list")
        self.made, self.offsets = dict(made), list[int]()
        before, ends = self._read()
        if before is not None and ends and before != self.made:
            raise UserInputError(
                f"--output: {str(self.draft)!r} holds {len(ends)} answers of an interrupted command, made differently: "
                f"{_differences(before, self.made)}. Repeat that command, remove the file, or name another --output."
            )
        self.offsets = ends[: len(ends) - len(ends) % batch_size]

    @property
    def count(self) -> int:
        """Number of answers that are there, whole batches."""
        return len(self.offsets)

    def begin(self) -> None:
        """Cut the draft to what is kept, and begin the list anew.

        Raises:
            OSError: If they cannot be written.
        """
        if self.offsets:
            os.truncate(self.draft, self.offsets[-1])
        lines = [json.dumps(self.made, sort_keys=True), *map(str, self.offsets)]
        self.list.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def end(self) -> None:
        """Remove the list: the answers have their name."""
        self.list.unlink(missing_ok=True)

    def _read(self) -> tuple[dict[str, Any] | None, list[int]]:
        try:
            first, *lines = self.list.read_text(encoding="utf-8").split("\n")
            before, size = json.loads(first), self.draft.stat().st_size
        except (OSError, ValueError):
            return None, []
        if not isinstance(before, dict):
            return None, []
        # A line that a killed process left unfinished has no end, so the last one never counts.
        ends = [int(line) for line in lines[:-1] if line.isdecimal()]
        return before, [end for end in ends if end <= size]


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {**was, **now} if was.get(key) != now.get(key))
    # Two hashes say nothing to a reader.
    return "; ".join(
        f"other {key}" if key == "prompts" else f"{key} was {was.get(key)!r}, is now {now.get(key)!r}" for key in keys
    )


def made_with(
    adapter_sha256: str, requests: Iterable[Mapping[str, Any]], decoding: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Return what decides a file of answers: two that are made with the same are the same file."""
    asked = json.dumps([dict(request) for request in requests], sort_keys=True)
    values = {"adapter": adapter_sha256, "prompts": sha256_of_text(asked), **decoding, **more}
    return json.loads(json.dumps(values))  # as it is read back: lists for tuples
