"""The runs of a sweep, one after another or several at a time, each in a process of its own.

A signal lets each run under way finish its step and write its checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..processes import ENDS_WITH_STDIN, python_command
from ..run_folder.stop import StopRequest, answered
from .asking import Asking
from .folder import is_done, log_of, recipe_of

POLL_SECONDS = 0.2  # how soon a signal is noticed
GRACE_SECONDS = 10  # from the second signal to the end by force
DIVERGED = 3  # exit code of a run whose loss or gradient stayed NaN or infinite
LINES_KEPT = 200  # of a run's output, to find the reason of a failure in


@dataclass(frozen=True)
class Outcome:
    """How a run of this session ended.

    Attributes:
        name: The run's name.
        code: Exit code, 0 for a finished run.
        reason: Why it did not finish, empty if it did.
        seconds: How long it took.
    """

    name: str
    code: int
    reason: str = ""
    seconds: float = 0.0


class Runner(Protocol):
    """Trains one run to its end."""

    def train(self, name: str, tell: Callable[[str], None], /) -> Outcome:
        """Train a run of the sweep; call ``tell`` with each line it prints."""
        ...

    def stop(self, number: int, /) -> None:
        """Let the runs under way stop at their next checkpoint."""

    def end(self) -> None:
        """Stop the runs under way at once."""


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
        names: Names of the runs.
        runner: Trains one.
        parallel: How many at a time.
        on_start: Called with a run's name as it begins.
        on_line: Called with a run's name and each line it prints, from another thread.
        on_end: Called with how a run ended.
        on_stop: Called with the name of a signal that asks to stop.

    Returns:
        The outcomes of the runs that were begun, and the signal that asked to stop, None without one.

    Raises:
        KeyboardInterrupt: On a second signal, after all runs were ended at once.
    """

    def heard(signal_name: str) -> None:
        on_stop(signal_name)
        assert stop.signal is not None  # it is set before it is told
        runner.stop(stop.signal)

    def begin(name: str) -> Future[Outcome]:
        on_start(name)
        return pool.submit(runner.train, name, lambda line: on_line(name, line))

    stop = StopRequest(grace_seconds=0, on_request=heard)  # the grace is each run's own: this process trains nothing
    waiting: deque[str] = deque(names)
    running: set[Future[Outcome]] = set()
    outcomes: list[Outcome] = []
    # Threads only wait for child processes; this one, the main thread, is where Python handles signals.
    with answered(stop), ThreadPoolExecutor(parallel) as pool:
        try:
            while running or (waiting and not stop.requested):
                while waiting and len(running) < parallel and not stop.requested:
                    running.add(begin(waiting.popleft()))
                done, running = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    outcomes.append(future.result())
                    on_end(outcomes[-1])
        except BaseException:  # a second signal too; the pool would otherwise wait for its children
            runner.end()
            raise
    return outcomes, stop.signal


class ProcessRunner:
    """A `Runner` that trains and measures each run in one process, see `one_run`.

    Args:
        output_dir: The sweep's folder.
        measures: Names from `plan.MEASURES`.
        threads: As in `Processes`.
        asking: What the measures need to know.
    """

    def __init__(
        self,
        output_dir: Path,
        measures: Sequence[str] = (),
        threads: int | None = None,
        asking: Asking = Asking(),  # noqa: B008  frozen
    ) -> None:
        self.output_dir, self.measures, self.asking = output_dir, tuple(measures), asking
        self._processes = Processes(threads)

    def train(self, name: str, tell: Callable[[str], None], /) -> Outcome:
        """Train a run if it is not trained, and take the measures it lacks."""
        started, folder = time.monotonic(), self.output_dir / name
        if is_done(folder, self.measures, self.asking):
            return Outcome(name, 0)
        log = log_of(self.output_dir, name)
        # The end only: the log has everything.
        lines: deque[str] = deque(maxlen=LINES_KEPT)

        def hear(line: str) -> None:
            lines.append(line)
            tell(line)

        arguments = [str(folder), str(recipe_of(self.output_dir, name)), self.asking.to_text(), *self.measures]
        code = self._processes(f"{__package__}.one_run", arguments, log, hear)
        reason = "" if code == 0 else f"{_reason(lines)} (exit code {code}; all its output: {log})"
        return Outcome(name, code, reason, time.monotonic() - started)

    def stop(self, number: int, /) -> None:
        """Pass the signal on."""
        self._processes.send(number)

    def end(self) -> None:
        """Stop at once."""
        self._processes.end()


class Processes:
    """Runs ``python -m MODULE`` and waits for it; several threads may do so at once.

    Each child has a session of its own, so that a terminal's Ctrl-C reaches it once, through `send`. In the terminal's
    session it would reach it twice, and the second would stop it without a checkpoint.

    Args:
        threads: ``OMP_NUM_THREADS`` of a child, unless the variable is set already; None to leave it as it is.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._children: set[subprocess.Popen[str]] = set()
        self._lock = threading.RLock()
        self._signal: int | None = None

    def __call__(self, module: str, arguments: Sequence[str], log: Path, tell: Callable[[str], None]) -> int:
        """Run a module to its end.

        Args:
            module: Name for ``python -m``.
            arguments: The module's arguments.
            log: File to which its output is appended.
            tell: Called with each line of it.

        Returns:
            Its exit code, negative for a signal that ended it.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            child = self._start(python_command(module, *arguments))
            assert child.stdout is not None and child.stdin is not None  # they are pipes
            try:
                for line in child.stdout:
                    # A full disk ends the run, which says so, not the reading, which would block it.
                    with suppress(OSError):
                        file.write(line)
                        file.flush()  # so that `tail -f` follows
                    tell(line.rstrip())
                return child.wait()
            finally:
                child.stdin.close()
                with self._lock:
                    self._children.discard(child)

    def send(self, number: int) -> None:
        """Pass a signal on to every child, and to those that start later."""
        with self._lock:
            self._signal = number
            for child in self._children:
                if child.poll() is None:
                    child.send_signal(number)

    def end(self) -> None:
        """Stop every child at once; kill those that do not stop."""
        self.send(signal.SIGINT)
        with self._lock:
            children = list(self._children)  # waited for outside the lock, which their threads need to sign off
        for child in children:
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        threads = {} if self._threads is None else {"OMP_NUM_THREADS": str(self._threads)}
        with self._lock:  # otherwise a signal could arrive after the child starts and before it is noted
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # held open for as long as this process lives: the child ends with it
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",  # a byte that is no UTF-8 must not end the reading, which would block the child
                # The user's own OMP_NUM_THREADS wins. Unbuffered: in a pipe lines would come in blocks of 8 KiB.
                env={**threads, **os.environ, "PYTHONUNBUFFERED": "1", ENDS_WITH_STDIN: "1"},
                start_new_session=True,
            )
            self._children.add(child)
            if self._signal is not None:
                child.send_signal(self._signal)
        return child


def _reason(lines: Sequence[str]) -> str:
    """Return the line that says why a run failed: its error message, or else the last line it printed."""
    # A traceback's last line is its message; the prefixes are those of `one_run.main`.
    told = [line for line in lines if line.startswith(("error: ", "failed: ", "interrupted: "))]
    spoken = [line for line in lines if line.strip()]
    return (told or spoken or ["no output"])[-1]
