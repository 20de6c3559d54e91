"""``kill -9``: at any instant from the start of a process on, and in the middle of a run; each run then goes on."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from .bench import SAVE_STEPS, STEPS, Bench, last_step
from .fault import Fault, hold

WHILE_STARTING, IN_THE_MIDDLE = 9, 41
SECONDS_TO_START = 12.0  # of a process that imports everything itself


def while_it_starts(bench: Bench) -> int:
    """Kill a process that may still be importing, preparing data or loading."""
    out = bench.new()
    return _killed(bench, out, bench.draw.uniform(0, SECONDS_TO_START), bench.start(*bench.command(out), quick=False))


def in_the_middle(bench: Bench) -> int:
    """Kill a run at a random instant after its first step."""
    out = bench.new()
    process, step = bench.start(*bench.command(out)), bench.draw.randint(1, STEPS - 1)
    bench.until(lambda: last_step(out) >= step, process)
    return _killed(bench, out, bench.draw.uniform(0, 0.1), process)


def _killed(bench: Bench, out: Path, seconds: float, process: subprocess.Popen[str]) -> int:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.wait()
    lost = bench.lost(out)
    hold(lost <= SAVE_STEPS, f"{lost} steps lost, with a checkpoint every {SAVE_STEPS}")
    bench.goes_on(out)
    return lost


FAULTS = [
    *(Fault("`kill -9` while a run starts", f"kill {n}", while_it_starts) for n in range(1, WHILE_STARTING + 1)),
    *(Fault("`kill -9` in the middle of a run", f"kill {n}", in_the_middle) for n in range(1, IN_THE_MIDDLE + 1)),
]
