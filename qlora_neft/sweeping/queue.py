"""The runs of a sweep one after another, or some at a time; a signal lets each finish its step and its checkpoint."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..run_folder.stop_request import StopRequest, answered
from .processes import Processes
from .sweep_file import recipe_of

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
            code = self._processes("qlora_neft.sweeping", [str(folder), *self.measures], log, hear)
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
