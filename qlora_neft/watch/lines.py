"""A file of JSON lines that another process, perhaps of another machine, is appending to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..run_folder.live import lines_of

CHECKED = 256  # bytes before the place where reading goes on: whether it is still the same file


class GrowingFile:
    """The whole lines of a file, read on from where the last reading ended.

    A resumed run writes the file anew, without what it logged beyond its checkpoint: then it is read from the start.

    Args:
        path: The file, which may not be there yet.

    Attributes:
        lines: Every line so far that is one.
        modified: When it was last written to, seconds since 1970 by the clock of its file system; None without a file.
        problem: Why it could not be read the last time, None if it could.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin_again()
        self.modified: float | None = None
        self.problem: str | None = None

    def _begin_again(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._offset, self._before, self._stamp = 0, b"", None

    def refresh(self) -> bool:
        """Read what is new, and return whether anything was."""
        self.problem = None
        try:
            if not self._path.is_file():  # also a pipe, at which reading would wait
                changed = bool(self.lines)
                self._begin_again()
                self.modified = None
                return changed
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp == self._stamp:
                return False
            self._read()
            self._stamp, self.modified = stamp, stat.st_mtime
        except OSError as error:  # a mount that is gone for a moment: what was read stands
            self.problem = f"{self._path.name} cannot be read ({error.strerror or error})"
            return False
        return True

    def _read(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._offset - len(self._before))
            if file.read(len(self._before)) != self._before:
                self._begin_again()
                file.seek(0)
            new = file.read()
        # Up to the last line end: what follows it is still being written.
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._before = (self._before + whole)[-CHECKED:]
        self.lines += lines_of(whole.decode("utf-8", errors="replace"))


def number(value: Any) -> float | None:
    """Return a finite number, None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None
