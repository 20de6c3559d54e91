"""Signals that ask a run to stop, at every stage of it."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .bench import EVAL_STEPS, LONGEST, Bench, last_step
from .fault import Fault, hold

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
STAGES: dict[str, Callable[[Path], object]] = {
    "while a checkpoint is written": lambda out: any(out.glob(".checkpoint-*")),
    "around an evaluation": lambda out: last_step(out) >= EVAL_STEPS,
    "in the last save": lambda out: (out / "adapter_model.safetensors").exists(),
}


def while_it_starts(bench: Bench, seconds: float) -> int:
    """SIGTERM so many seconds after a process began to import everything."""
    out = bench.new()
    process = bench.start(*bench.command(out), quick=False, stderr=subprocess.PIPE)
    time.sleep(seconds)
    return _stopped(bench, out, process, "SIGTERM")


def at(bench: Bench, reached: Callable[[Path], object], *names: str, apart: float = 0.05) -> int:
    """Signals as soon as a stage is reached."""
    out = bench.new()
    process = bench.start(*bench.command(out), stderr=subprocess.PIPE)
    bench.until(lambda: reached(out), process)
    for name in names[:-1]:
        process.send_signal(getattr(signal, name))
        time.sleep(apart)
    return _stopped(bench, out, process, *names[-1:], first=names[0])


def _stopped(bench: Bench, out: Path, process: subprocess.Popen[str], name: str, first: str | None = None) -> int:
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=LONGEST)
    code = 128 + getattr(signal, first or name)
    hold(process.returncode in (code, 0), f"it ended with {process.returncode} instead of {code}: {said[-300:]}")
    hold(process.returncode == 0 or said.startswith("interrupted: "), f"it said {said[-300:]!r}")
    lost = bench.lost(out)
    hold(lost == 0, f"{lost} steps were not saved")
    bench.goes_on(out)
    return lost


def _later(out: Path) -> bool:
    return last_step(out) >= 5


FAULTS = [
    *(
        Fault("a signal to stop", f"{name} in a step", lambda bench, name=name: at(bench, _later, name))
        for name in NAMES
    ),
    Fault("a signal to stop", "SIGINT twice within 50 ms", lambda bench: at(bench, _later, "SIGINT", "SIGINT")),
    Fault("a signal to stop", "SIGHUP, then SIGTERM", lambda bench: at(bench, _later, "SIGHUP", "SIGTERM")),
    *(
        Fault("a signal to stop", f"SIGTERM {stage}", lambda bench, reached=reached: at(bench, reached, "SIGTERM"))
        for stage, reached in STAGES.items()
    ),
    *(
        Fault("a signal to stop", f"SIGTERM after {s} s of loading", partial(while_it_starts, seconds=s))
        for s in (2, 4, 6, 8, 10)
    ),
]
