"""The verbs from a notebook: each in a process of its own, its lines as they come, its losses as they fall.

A process gives all of a GPU's memory back when it ends, and is not touched by what the kernel has imported: a package
installed a cell above needs no restart. `!qlora-neft ...` would do the same, but "Run all" goes on after it fails.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .display.plots import plot_losses
from .errors import RunFailed, UserInputError

SECONDS_BETWEEN_PICTURES = 2.0
WIDTH = "120"  # columns of the tables in a cell's output


def command(*arguments: object) -> None:
    """Run a verb of the command line, and show what it says as it says it.

    ``command("fit", "demo", "lora.r=8")`` is ``qlora-neft fit demo lora.r=8``. Interrupting the cell is Ctrl-C:
    training writes a checkpoint first.

    Args:
        arguments: The words of the command; anything but text is written as `str` has it.

    Raises:
        UserInputError: If the command ended with exit code 2; its message stands in the output above.
        RunFailed: If it ended with another exit code; the same.
        KeyboardInterrupt: If it was interrupted.
    """
    _show_command(arguments)
    _check(arguments, _follow(arguments, lambda: None))


def output_of(*arguments: object) -> str:
    """What a verb prints on standard output, for ``json.loads`` with ``"--json"``.

    Args:
        arguments: As for `command`.

    Raises:
        UserInputError: If the command ended with exit code 2; its message is shown.
        RunFailed: If it ended with another exit code; the same.
    """
    done = subprocess.run(_argv(arguments), capture_output=True, **_TEXT, env=_environment())
    if done.returncode:
        sys.stdout.write(done.stderr)
    _check(arguments, done.returncode)
    return done.stdout


def train_live(name: str | Path, *overrides: str, output_dir: str | Path) -> dict[str, Any]:
    """Train a recipe as ``qlora-neft train`` does, with a picture of the losses that is drawn anew as they come.

    Called again after an interruption or a disconnect it goes on, and the picture shows the run from its first step.

    Args:
        name: A recipe's name, or a path to a YAML file.
        overrides: ``section.key=value``.
        output_dir: A new or empty folder, or that of this recipe's run.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserInputError: As `command`.
        RunFailed: As `command`; called again, it goes on from the newest checkpoint.
        KeyboardInterrupt: If it was interrupted; the same.
    """
    arguments = ("train", name, "--output-dir", output_dir, *overrides)
    _show_command(arguments)
    picture = _Picture(Path(output_dir))
    code = _follow(arguments, picture.refresh)
    picture.refresh(now=True)
    _check(arguments, code)
    return json.loads(Path(output_dir, "summary.json").read_text(encoding="utf-8"))


class _Picture:
    """The losses of a run in the output of a cell."""

    def __init__(self, output_dir: Path) -> None:
        from IPython.display import Markdown, display

        self.metrics, self.title, self.drawn = output_dir / "metrics.jsonl", str(output_dir), 0.0
        self.place = display(Markdown("*losses appear here*"), display_id=True)

    def refresh(self, now: bool = False) -> None:
        """Draw what is logged so far, if the last time is long enough ago."""
        entries = self._entries()
        if not entries or not (now or time.monotonic() - self.drawn > SECONDS_BETWEEN_PICTURES):
            return
        from IPython.display import Image

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "loss.png")
            if plot_losses(entries, path, self.title) and self.place is not None:  # None: no notebook is looking
                self.place.update(Image(data=path.read_bytes(), width=800))
        self.drawn = time.monotonic()

    def _entries(self) -> list[dict[str, Any]]:
        """The log entries with a step; the last line may be under way."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [entry for line in lines if line.endswith("\n") and "step" in (entry := json.loads(line))]


_TEXT = {"encoding": "utf-8", "errors": "replace"}


def _follow(arguments: tuple[object, ...], after_each_line: Callable[[], None]) -> int:
    """Run a command to its end, show what it prints, and return its exit code."""
    # A session of its own: an interrupted cell signals all of the kernel's, and two signals mean "stop at once".
    with subprocess.Popen(
        _argv(arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(),
        start_new_session=True,
    ) as process:
        # newline="" keeps the carriage returns with which progress bars overwrite themselves.
        output = io.TextIOWrapper(process.stdout, newline="", **_TEXT)
        while True:
            try:
                for line in output:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                    after_each_line()
                return process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)


def _show_command(arguments: tuple[object, ...]) -> None:
    print(f"$ qlora-neft {shlex.join(map(str, arguments))}", flush=True)


def _argv(arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-m", "qlora_neft", *map(str, arguments)]


def _environment() -> dict[str, str]:
    return {"COLUMNS": WIDTH, **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def _check(arguments: tuple[object, ...], code: int) -> None:
    """Raise what an exit code stands for."""
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        kind = UserInputError if code == 2 else RunFailed
        raise kind(f"qlora-neft {arguments[0]} ended with exit code {code}; why stands in the output above")
