"""The process that started a run is killed: the run saves and ends, and leaves nothing behind."""

from __future__ import annotations

import time
from pathlib import Path

from .bench import LONGEST, Bench, last_step
from .fault import Fault, hold

KEY = "neftune.noise_alpha"


def killed_sweep(bench: Bench) -> int:
    """Kill a sweep while a run of it trains; the same command then ends the sweep."""
    out = bench.new()
    words = ["-P", "-m", "qlora_neft", "sweep", "mine.yaml", f"{KEY}=5,6", "--seeds", "1", "--output-dir", str(out)]
    process = bench.start(*words)
    bench.until(lambda: any(last_step(folder) >= 3 for folder in _runs(out)), process)
    process.kill()
    process.wait()
    [run] = _runs(out)
    end = time.monotonic() + 60
    while (run / ".run.lock").exists():
        hold(time.monotonic() < end, "its run outlives it")
        time.sleep(0.01)
    lost = bench.lost(run)
    hold(lost == 0, f"{lost} steps were not saved")
    code = bench.start(*words).wait(LONGEST)
    hold(code == 0, f"the same command ended with {code}")
    hold(len(_runs(out)) == 2, "a run is missing")
    return lost


def _runs(out: Path) -> list[Path]:
    return [path.parent for path in out.glob("*/run.json")]


FAULTS = [Fault("the process that started a run is killed", "a sweep", killed_sweep)]
