"""What a run has to say when nobody can be told: ``notes.log`` in its folder."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

NOTES_FILE = "notes.log"


class RunNotes:
    """Notes of a run, kept back until its folder is known to be its own.

    Args:
        output_dir: The run's folder.
        is_kept: Whether this process writes there.
    """

    def __init__(self, output_dir: Path, *, is_kept: bool = True) -> None:
        self._path, self._is_kept = output_dir / NOTES_FILE, is_kept
        self._waiting: list[str] = []
        self._is_open = False

    def __call__(self, note: str) -> None:
        """Write a line down, with the time."""
        self._waiting.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {note}\n")
        if self._is_open:
            self.open()

    def open(self) -> None:
        """Write what was kept back; from now on notes are written at once."""
        self._is_open = True
        waiting, self._waiting = self._waiting, []
        if waiting and self._is_kept:
            with suppress(OSError), self._path.open("a", encoding="utf-8") as file:  # a full disk is told elsewhere
                file.writelines(waiting)
