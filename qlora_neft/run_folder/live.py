"""``live.jsonl``: what a run is doing and when it took its steps, for whoever watches it from outside. No torch.

``metrics.jsonl`` holds no times, so that two runs of the same recipe write the same bytes; they stand here. The file is
no record of the run: it is cut to a bounded length, and a line that cannot be written is lost in silence.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import write_text
from .record import RUN_FILE, Record

LIVE_FILE = "live.jsonl"
PREPARING, TRAINING, EVALUATING, MEASURING = "preparing", "training", "evaluating", "measuring"
FINISHED, INTERRUPTED, FAILED = "finished", "interrupted", "failed"
MOST_LINES, LINES_KEPT = 2000, 1000  # the longer file, about 300 kB, is cut to the shorter


class LiveLine(Record):
    """A line of the file.

    Attributes:
        time: Seconds since 1970, by the clock of the run's machine.
        phase: What the run does from then on: one of the constants above.
        step: Optimizer steps taken.
        steps: Optimizer steps of the whole run.
        tokens: Real tokens trained on so far, by the first rank.
        ranks: Processes that train.
        bad_steps: Steps skipped so far because they were not finite.
        host_bytes, cuda_allocated_bytes, cuda_reserved_bytes: Peaks of this session, of the first rank.
        note: Why a run ended.
    """

    time: float
    phase: str
    step: int
    steps: int | None = None
    tokens: int | None = None
    ranks: int | None = None
    bad_steps: int | None = None
    host_bytes: int | None = None
    cuda_allocated_bytes: int | None = None
    cuda_reserved_bytes: int | None = None
    note: str | None = None


class LiveFile:
    """The file of a run under way. Nothing here ever stops the run: not a full disk, nor a folder in the file's place.

    Args:
        output_dir: The run's folder.
        is_kept: Whether this process writes there.

    Attributes:
        written: When the last line was written, by the monotonic clock.
    """

    def __init__(self, output_dir: Path, *, is_kept: bool = True) -> None:
        self._output_dir, self._path, self._is_kept = output_dir, output_dir / LIVE_FILE, is_kept
        self._step = self._lines = 0
        self._is_open = False
        self.written = 0.0

    def open(self, step: int) -> None:
        """Begin a session at a step, once the folder is known to be a run's; drop what was written of later steps."""
        # A folder that holds anything before run.json would be refused as no run's.
        if self._is_open or not self._is_kept or not (self._output_dir / RUN_FILE).exists():
            return
        self._is_open, self._step = True, step
        self._cut(lambda line: line["step"] <= step)
        self.write(PREPARING, step)

    def write(self, phase: str, step: int | None = None, **values: Any) -> None:
        """Append a line; ``step`` is that of the line before unless it is given, ``values`` are those of `LiveLine`."""
        self._step, self.written = self._step if step is None else step, time.monotonic()
        if not self._is_open:
            return
        line = {"time": round(time.time(), 3), "phase": phase, "step": self._step, **values}
        with suppress(OSError):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._lines += 1
        if self._lines > MOST_LINES:
            self._cut(lambda line: True)

    def _cut(self, is_kept: Any) -> None:
        with suppress(OSError):
            if not self._path.is_file():
                return
            text = self._path.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in lines_of(text) if is_kept(line)][-LINES_KEPT:]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            self._lines = len(kept)


def lines_of(text: str) -> list[dict[str, Any]]:
    """Return the lines that are whole; a power cut or a reader's bad moment leaves one that is not."""
    found = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                found.append(entry)
    return found
