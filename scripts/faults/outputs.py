"""A reader of a run's output that goes away: `| head`, a killed `tee`, a closed terminal, a full disk for the log."""

from __future__ import annotations

import signal
import subprocess
from functools import partial
from pathlib import Path

from .bench import LONGEST, Bench, last_step
from .fault import Fault, NotTried, hold


def reader_gone(bench: Bench, lines: int, number: int | None = None) -> int:
    """Read so many lines of stdout and stderr, close both, and perhaps send a signal later."""
    out = bench.new()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = bench.start(*bench.command(out), **pipes)
    assert process.stdout is not None
    for _ in range(lines):
        hold(process.stdout.readline(), "it ended before it had said anything")
    process.stdout.close()
    if number is not None:
        bench.until(lambda: last_step(out) >= 5, process)
        process.send_signal(number)
    code = process.wait(LONGEST)
    hold(code == (128 + number if number else 0), f"it ended with {code}")
    noted = (out / "notes.log").read_text().splitlines() if (out / "notes.log").exists() else []
    hold(len(noted) == 1, f"{len(noted)} notes in the run's folder")
    lost = bench.lost(out)
    hold(lost == 0, f"{lost} steps were not saved")
    bench.goes_on(out)
    return lost


def log_on_a_full_disk(bench: Bench) -> int:
    """Send all output to a device that is always full."""
    if not Path("/dev/full").exists():
        raise NotTried("no device that is always full")
    out = bench.new()
    with Path("/dev/full").open("w") as full:
        code = bench.start(*bench.command(out), stdout=full, stderr=full).wait(LONGEST)
    hold(code == 0, f"it ended with {code}")
    bench.goes_on(out)
    return 0


GONE = "a reader of the output goes away"
FAULTS = [
    Fault(GONE, "before the first line", partial(reader_gone, lines=0)),
    Fault(GONE, "after a line", partial(reader_gone, lines=1)),
    Fault(GONE, "then SIGINT", partial(reader_gone, lines=1, number=signal.SIGINT)),
    Fault(GONE, "then SIGHUP", partial(reader_gone, lines=1, number=signal.SIGHUP)),
    Fault(GONE, "the log is on a full disk", log_on_a_full_disk),
]
