"""A session as a process, whose output goes to a file. No torch.

While one measures, the next may import what it needs and wait: imports take longer than many measurements. It waits
without touching the device, and imports while the other still makes its base.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .conduct import Options, Outcome
from .machine import ROOT
from .parts import write_part
from .plan import ARMS, Session
from .record_tests import RECORD, summary

CPUS_FOR_TWO = 4  # with fewer, the one that imports would slow the one that measures


@dataclass
class Running:
    """A process that has been started for a session.

    Attributes:
        session: What it is for.
        process: It waits for a line on its standard input, unless it is pytest.
        log: File of its output.
    """

    session: Session
    process: subprocess.Popen[bytes]
    log: Path

    def end(self) -> None:
        """End it, with all that it has started, if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Processes:
    """Launches sessions; used as a context manager, it leaves no process behind."""

    def __init__(self, *, ahead: bool = (os.cpu_count() or 1) >= CPUS_FOR_TWO) -> None:
        self.ahead = ahead
        self._waiting: Running | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._give_up_waiting()

    def __call__(self, session: Session, options: Options, limit: float, upcoming: Session | None) -> Outcome:
        """Run a session and wait for it, at most ``limit`` seconds."""
        began = time.monotonic()
        running = self._ready(session, options)
        try:
            self._go(running)
            if self.ahead and upcoming is not None and upcoming.kind != "tests":
                self._waiting = _start(upcoming, options)
            code = running.process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also when this program is interrupted
            running.end()
        return _outcome(running, options, code, time.monotonic() - began)

    def _ready(self, session: Session, options: Options) -> Running:
        if self._waiting is not None and self._waiting.session == session:
            running, self._waiting = self._waiting, None
            return running
        self._give_up_waiting()
        return _start(session, options)

    def _go(self, running: Running) -> None:
        if running.process.stdin is None:
            return
        try:
            running.process.stdin.write(b"go\n")
            running.process.stdin.close()
        except BrokenPipeError:  # it has failed already; its exit code and its last words say how
            pass

    def _give_up_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.end()
            self._waiting = None


def _start(session: Session, options: Options) -> Running:
    log = options.state / "logs" / f"{session.keys[0]}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if session.kind == "tests":
        _record(options).unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            _command(session, options),
            stdin=None if session.kind == "tests" else subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=_environment(session, options),
            process_group=0,  # so that it can be ended with all that it has started
        )
    return Running(session, process, log)


def _command(session: Session, options: Options) -> list[str]:
    if session.kind == "tests":
        # Without the project's own options: a plugin that they need may not be installed.
        return [
            *(sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.record_tests", "-p", "no:cacheprovider"),
            *("-o", "addopts=", "-o", "filterwarnings=", *options.tests),
        ]
    python = options.unsloth if _is_foreign(session) and options.unsloth else sys.executable
    spec = {**session.to_dict(), "state": str(options.state), "device": options.device, "tiny": options.tiny}
    return [python, "-m", "benchmarks.gpu.session", json.dumps(spec)]


def _is_foreign(session: Session) -> bool:
    return any(ARMS[run.arm].trainer == "unsloth" for run in session.runs)


def _environment(session: Session, options: Options) -> dict[str, str]:
    # Packages of this environment are none of the other's business.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or not _is_foreign(session)}
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", RECORD: str(_record(options))}
    return {**kept, "PYTHONUNBUFFERED": "1", **own}


def _record(options: Options) -> Path:
    return options.state / "tests.jsonl"


def _outcome(running: Running, options: Options, code: int | None, seconds: float) -> Outcome:
    """Return how a session ended, and write the result of tests, which write none themselves.

    Args:
        running: The session.
        options: Where results are.
        code: Its exit code; None if it was ended at its limit.
        seconds: That it took.
    """
    if running.session.kind == "tests":
        found: dict[str, Any] = summary(_record(options), cut_off=code is None)
        # 0 and 1: all passed, and not all. Anything else is a result only as far as tests have run.
        if code in (0, 1) or found["tests"]:
            write_part(options.state, running.session.name, {**found, "seconds": seconds})
            return Outcome("", seconds)
    if code == 0:
        return Outcome("", seconds)
    reason = f"ended after {seconds:.0f} s" if code is None else f"exit code {code}"
    return Outcome(f"{reason}: {_last_words(running.log)}", seconds)


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no output"
