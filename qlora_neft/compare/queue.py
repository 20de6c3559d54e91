"""The runs of a sweep one after another, or some at a time; a signal lets each finish its step and its checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..run_folder.stop import StopRequest, answered
from .plan import recipe_of

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


POLL_SECONDS = 0.2  # in which a signal is heard


@dataclass(frozen=True)
class Outcome:
    """How a run of this session ended.

    Attributes:
        name: Its name.
        code: Exit code, 0 for a finished run.
        reason: Why it did not finish, empty if it did.
        seconds: Its time.
    """

    name: str
    code: int
    reason: str = ""
    seconds: float = 0.0


class Runner(Protocol):
    """Trains one run to its end."""

    def train(self, name: str, tell: Callable[[str], None]) -> Outcome:
        """Train a run of the sweep; ``tell`` is told what it prints."""

    def stop(self, number: int) -> None:
        """Let what is under way stop at its next checkpoint."""

    def end(self) -> None:
        """Stop what is under way at once."""


class ProcessRunner:
    """`Runner` by ``python -m qlora_neft train``, and a second process for what is measured afterwards.

    Args:
        output_dir: The sweep's folder.
        measures: Names from `measures.MEASURES`.
        threads: As in `Processes`.
    """

    def __init__(self, output_dir: Path, measures: Sequence[str] = (), threads: int | None = None) -> None:
        self.output_dir, self.measures, self._processes = output_dir, tuple(measures), Processes(threads)

    def train(self, name: str, tell: Callable[[str], None]) -> Outcome:
        """Train a run if it is not finished, and measure what is not measured."""
        started, folder = time.monotonic(), self.output_dir / name
        log = self.output_dir / "logs" / f"{name}.log"
        lines: deque[str] = deque(maxlen=200)

        def hear(line: str) -> None:
            lines.append(line)
            tell(line)

        code = 0
        if not (folder / "summary.json").exists():
            recipe = recipe_of(self.output_dir, name)
            arguments = ["train", str(recipe), "--output-dir", str(folder)]
            code = self._processes("qlora_neft", arguments, log, hear)
        if code == 0 and self.measures:
            code = self._processes("qlora_neft.compare.measures", [str(folder), *self.measures], log, hear)
        reason = "" if code == 0 else f"{_reason(lines)} (exit code {code}; all it said: {log})"
        return Outcome(name, code, reason, time.monotonic() - started)

    def stop(self, number: int) -> None:
        """Pass the signal on."""
        self._processes.send(number)

    def end(self) -> None:
        """Stop at once."""
        self._processes.end()


def run_queue(
    names: Sequence[str],
    runner: Runner,
    *,
    parallel: int = 1,
    on_start: Callable[[str], None] = lambda name: None,
    on_line: Callable[[str, str], None] = lambda name, line: None,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
    on_stop: Callable[[str], None] = lambda signal_name: None,
) -> tuple[list[Outcome], int | None]:
    """Train runs in order; one that fails does not end the others.

    Args:
        names: Of the runs.
        runner: Trains one.
        parallel: How many at a time.
        on_start: Told a run's name as it begins.
        on_line: Told a run's name and each line it prints; from another thread.
        on_end: Told how a run ended.
        on_stop: Told the name of a signal that asks to stop.

    Returns:
        How those ended that were begun, and the signal that asked to stop, None without one.

    Raises:
        KeyboardInterrupt: On a second signal, all runs ended at once.
    """

    def heard(signal_name: str) -> None:
        on_stop(signal_name)
        runner.stop(stop.signal)

    stop = StopRequest(grace_seconds=0, on_request=heard)
    waiting, outcomes, running = deque(names), [], set()
    with answered(stop), ThreadPoolExecutor(parallel) as pool:
        try:
            while running or (waiting and not stop.requested):
                while waiting and len(running) < parallel and not stop.requested:
                    name = waiting.popleft()
                    on_start(name)
                    running.add(pool.submit(runner.train, name, lambda line, name=name: on_line(name, line)))
                done, running = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    outcomes.append(future.result())
                    on_end(outcomes[-1])
        except BaseException:
            runner.end()
            raise
    return outcomes, stop.signal


def _reason(lines: Sequence[str]) -> str:
    """The message of a run that failed: what it called an error, else its last line."""
    told = [line for line in lines if line.startswith(("error: ", "failed: ", "interrupted: "))]
    spoken = [line for line in lines if line.strip()]
    return (told or spoken or ["no output"])[-1]
