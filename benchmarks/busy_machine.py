"""A training step beside busy programs: idle OpenMP threads that sleep, as this project sets them, and that spin.

    python benchmarks/busy_machine.py --output docs/results/busy_machine.json

The demo is trained for some steps on two cores, alone and beside one and two loops that do nothing but compute, with
``OMP_WAIT_POLICY=PASSIVE`` and without. A step's time is taken between the first and the last log line, so imports do
not count; a run ends after its steps or its time limit. Beside the JSON goes a page of the same name. No network and no
GPU; up to six minutes, and nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

CORES = 2
LOOPS = (0, 1, 2)
LIMITS = {1: 1.5, 2: 2.5}  # times the step of the idle machine, by number of loops
ARMS = {"sleeping": "OMP_WAIT_POLICY=PASSIVE", "spinning": "without"}
# Importing the package sets the variable; it must be gone again before torch loads its OpenMP.
TRAIN = {
    "sleeping": "from qlora_neft.cli import main; main()",
    "spinning": "import os, qlora_neft; del os.environ['OMP_WAIT_POLICY']; from qlora_neft.cli import main; main()",
}
OVERRIDES = ("machine.device=cpu", "machine.logging_steps=1", "machine.eval_answers=0", "machine.save_steps=0")


def main() -> None:
    """Run all arms, print their seconds per step, and optionally write them with a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps per run")
    parser.add_argument("--limit", type=float, default=40, help="seconds after the first step at which a run is ended")
    parser.add_argument("--output", type=Path, help="JSON file to write; the page goes beside it")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)  # inherited by everything started below
    seconds = {arm: [step_seconds(arm, loops, options.steps, options.limit) for loops in LOOPS] for arm in ARMS}
    found = {
        "steps": options.steps,
        "cores": len(cores),
        "machine": platform.processor() or platform.machine(),
        "busy_loops": list(LOOPS),
        "step_seconds": seconds,
        "times_idle": {arm: [value / values[0] for value in values] for arm, values in seconds.items()},
        "limits": {str(loops): limit for loops, limit in LIMITS.items()},
    }
    print(json.dumps(found, indent=2))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(page(found, options.output.name), encoding="utf-8")


def step_seconds(arm: str, loops: int, steps: int, limit: float) -> float:
    """Train the demo beside busy loops and return its seconds per step."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder, busy(loops):
        words = ["train", "demo", "--output-dir", folder, f"train.max_steps={steps}", *OVERRIDES]
        process = subprocess.Popen(
            [sys.executable, "-c", TRAIN[arm], *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**variables, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            times = _times_of_steps(process, Path(folder, "metrics.jsonl"), steps, limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    value = (times[-1] - times[0]) / (len(times) - 1)
    print(f"{arm}, {loops} busy loops: {value:.3f} s a step ({len(times) - 1} steps)", file=sys.stderr)
    return value


def _times_of_steps(process: subprocess.Popen[bytes], metrics: Path, steps: int, limit: float) -> list[float]:
    """Return when each step was logged, as far as the run came."""
    times: list[float] = []
    while len(times) < steps and not (len(times) > 1 and time.monotonic() > times[0] + limit):
        if process.poll() is not None and len(times) < 2:
            raise SystemExit(f"the run ended with exit code {process.returncode} before its second step")
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
        logged = {entry["step"] for line in lines if line.endswith("\n") and "loss" in (entry := json.loads(line))}
        times += [time.monotonic()] * (len(logged) - len(times))
        if process.poll() is not None:
            break
        time.sleep(0.02)
    return times


@contextlib.contextmanager
def busy(loops: int) -> Generator[None, None, None]:
    """Keep as many processes computing as there are loops."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def page(found: dict, raw: str) -> str:
    """Return the page of the figures."""
    price = found["step_seconds"]["sleeping"][0] / found["step_seconds"]["spinning"][0]
    lines = ["| busy loops | " + " | ".join(f"{ARMS[arm]}, a step | times idle" for arm in ARMS) + " | limit |"]
    lines.append("|---|" + "---:|---:|" * len(ARMS) + "---:|")
    for i, loops in enumerate(found["busy_loops"]):
        cells = [f"{found['step_seconds'][arm][i]:.3f} s | {found['times_idle'][arm][i]:.2f}" for arm in ARMS]
        limit = found["limits"].get(str(loops), "")
        lines.append(f"| {loops} | " + " | ".join(cells) + f" | {limit} |")
    return f"""# A training step beside busy programs

The demo, {found["steps"]} steps on {found["cores"]} cores, alone and beside loops that do nothing but compute, with
idle OpenMP threads that sleep (`OMP_WAIT_POLICY=PASSIVE`, which `qlora_neft` sets unless you have set it) and without.

{chr(10).join(lines)}

Measured by `benchmarks/busy_machine.py` between the first and the last logged step; a run that is too slow is ended
after a time limit and counted by the steps it made. The limit is what this project holds itself to, in times of the
idle machine's step with the same setting. Two threads beside one loop on two cores get 1.5 of the 2 cores at best,
beside two loops 1. Machine: {found["machine"]}. Raw figures: [{raw}]({raw}).

Sleeping has a price where nothing else runs: there a step takes {price:.2f} times as long as with threads that spin.
On a machine that does nothing else, set `OMP_WAIT_POLICY=ACTIVE`; a value of your own is kept.
"""


if __name__ == "__main__":
    main()
