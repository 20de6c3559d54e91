"""Which runs a folder stands for, and their frames: once, as JSON, or again and again on a terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

from ..compare.records import SWEEP_FILE, read_sweep
from ..errors import UserInputError
from ..files import visible
from ..run_folder.checkpoints import MANIFEST
from ..run_folder.live import FINISHED
from .clock import Clock
from .frame import Look, arms, frame
from .run import Snapshot, WatchedRun, is_run

GLANCE = 0.25  # seconds: how soon a terminal of another size is noticed
NO_GLYPHS = ("dumb", "linux")  # terminals whose font has no braille


class Watched:
    """What a folder stands for: a run, or all runs of a sweep. It may change while it is watched.

    Args:
        folder: Of a run, a mirror, a sweep, or one that holds folders of runs.

    Raises:
        UserInputError: If it holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._clock = folder, Clock()
        self._runs: dict[str, WatchedRun] = {}
        self._names()

    def look(self) -> list[tuple[str, Snapshot]]:
        """Return the runs as they are now, by name; one without a name is the folder itself."""
        names = self._names()
        for name in names:
            self._runs.setdefault(name, WatchedRun(self.folder / name if name else self.folder))
        return [(name, self._runs[name].look(self._clock)) for name in names]

    def _names(self) -> list[str]:
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UserInputError(f"{folder}: is a file. Give the --output-dir of train or sweep.")
        try:
            if (folder / SWEEP_FILE).is_file() and (sweep := read_sweep(folder)) is not None:
                return [run.name for run in sweep.runs]
            if is_run(folder) or not folder.is_dir() or not visible(folder) or "" in self._runs:
                return [""]
            if (folder / MANIFEST).is_file():
                raise UserInputError(
                    f"{folder}: is a checkpoint. Give the folder of its run, {folder.resolve().parent}."
                )
            found = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_run(path))
        except OSError as error:
            raise UserInputError(f"{folder}: cannot be read ({error.strerror or error}).") from error
        if not found:
            raise UserInputError(
                f"{folder}: holds no run. Expected run.json (the --output-dir of train, or its mirror_dir), "
                "sweep.json, or folders of runs."
            )
        return found


def to_json(folder: Path, runs: list[tuple[str, Snapshot]]) -> dict[str, Any]:
    """Return the state of one run, or of several under ``runs``."""
    if [name for name, _ in runs] == [""]:
        return runs[0][1].to_json()
    is_over = all(snapshot.state == FINISHED for _, snapshot in runs)
    return {
        "folder": str(folder),
        "state": FINISHED if is_over else "under way",
        "runs": [{"name": name, **snapshot.to_json()} for name, snapshot in runs],
    }


def picture(folder: Path, runs: list[tuple[str, Snapshot]], look: Look) -> RenderableType:
    """Return the frame of one run or several."""
    if [name for name, _ in runs] == [""]:
        return frame(runs[0][1], look)
    return arms(runs, look, str(folder))


def look_of(console: Console, *, ascii_only: bool = False) -> Look:
    """Return what a console can show."""
    plain = ascii_only or console.options.ascii_only or os.environ.get("TERM") in NO_GLYPHS
    # A pipe has no height: the whole frame, with a picture of usual size.
    return Look(console.width, console.height if console.is_terminal else 30, plain)


def follow(watched: Watched, console: Console, interval: float, *, ascii_only: bool = False) -> None:
    """Show frame after frame until everything is finished or the user stops it; the last one stays on the screen.

    Args:
        watched: What to show.
        console: A terminal.
        interval: Seconds between two readings of the folder.
        ascii_only: Whether to draw in ASCII.
    """
    runs = watched.look()

    def shown() -> RenderableType:
        return picture(watched.folder, runs, look_of(console, ascii_only=ascii_only))

    try:
        with Live(shown(), console=console, screen=True, auto_refresh=False) as live:
            while not all(snapshot.state == FINISHED for _, snapshot in runs):
                _rest(interval, console, lambda: live.update(shown(), refresh=True))
                runs = watched.look()
                live.update(shown(), refresh=True)
    finally:
        # Also after Ctrl-C: the screen of its own is gone, and what was last seen should not be.
        console.print(shown())


def _rest(seconds: float, console: Console, resized: Callable[[], None]) -> None:
    end, size = time.monotonic() + seconds, console.size
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, GLANCE))
        if console.size != size:
            size = console.size
            resized()
