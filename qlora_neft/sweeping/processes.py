"""Each run in a process of its own: its memory is free when it ends, and its crash ends no other run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

GRACE_SECONDS = 10  # from the second signal to the end by force


class Processes:
    """Runs ``python -m ...`` and waits; several threads may do so at once.

    A child has a session of its own, so that a terminal's Ctrl-C reaches it once, through `send`, and not twice: the
    second would stop it without a checkpoint.

    Args:
        threads: For ``OMP_NUM_THREADS`` of a child, None to leave that as it is.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._children: set[subprocess.Popen] = set()
        self._lock = threading.RLock()
        self._signal: int | None = None

    def __call__(self, module: str, arguments: Sequence[str], log: Path, tell: Callable[[str], None]) -> int:
        """Run a module to its end.

        Args:
            module: For ``python -m``.
            arguments: Of it.
            log: File that its output is appended to.
            tell: Told each line of it.

        Returns:
            Its exit code, negative for a signal that ended it.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", module, *arguments]
        with log.open("a", encoding="utf-8") as file:
            child = self._start(command)
            try:
                for line in child.stdout:
                    file.write(line)
                    file.flush()
                    tell(line.rstrip())
                return child.wait()
            finally:
                with self._lock:
                    self._children.discard(child)

    def _start(self, command: list[str]) -> subprocess.Popen:
        threads = {} if self._threads is None else {"OMP_NUM_THREADS": str(self._threads)}
        with self._lock:  # or a signal could arrive between the start and the note of it
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env={**threads, **os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
            self._children.add(child)
            if self._signal is not None:
                child.send_signal(self._signal)
        return child

    def send(self, number: int) -> None:
        """Pass a signal on to every child, and to those that start later."""
        with self._lock:
            self._signal = number
            for child in self._children:
                if child.poll() is None:
                    child.send_signal(number)

    def end(self) -> None:
        """Stop every child at once; by force those that do not."""
        self.send(signal.SIGINT)
        with self._lock:
            children = list(self._children)
        for child in children:
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
