"""Where faults are tried: runs of a tiny model as real processes, and what they are compared with."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_neft.run_folder.checkpoints import find_checkpoints

from .fault import hold

ROOT = Path(__file__).parents[2]
# Of the recipe of `command_line.make_workplace`, in tests/: noise, dropout, two micro-batches a step, held-out rows.
STEPS, SAVE_STEPS, EVAL_STEPS = 30, 5, 4
LONGEST = 300  # seconds a run may take before it counts as hanging


class Bench:
    """Makes runs, breaks off runs, compares runs.

    Args:
        folder: For all of them; it must exist.
        seed: Of the random instants.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.draw, self._count = folder, random.Random(seed), 0
        sys.path.append(str(ROOT / "tests"))
        os.environ |= {"QLORA_NEFT_TEST_SESSION": str(folder), "QLORA_NEFT_TEST_SESSION_OWNER": str(os.getpid())}
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        # Only now, since they read some of these variables when they are imported.
        import command_line
        import forked
        import tiny

        self.environment = forked.environment()
        self.base = tiny.save_tiny_model(folder / "llama")
        self.work = command_line.make_workplace(folder / "work", self.base)

    # ---- Processes ----

    @cached_property
    def quick_python(self) -> str:
        """A Python whose processes are forked from one that has imported everything; see `tests/forked.py`."""
        import forked

        return forked.quick_python()

    def command(self, out: Path, *overrides: str) -> list[str]:
        """Return the words behind ``python`` that train into a folder."""
        return ["-P", "-m", "qlora_neft", "train", "mine.yaml", "--output-dir", str(out), *overrides]

    def start(self, *words: str, quick: bool = True, **options: Any) -> subprocess.Popen[str]:
        """Start ``python WORDS`` in a session of its own.

        Args:
            words: Such as `command` makes.
            quick: Whether it may be forked rather than started anew, which costs 7 s of imports.
            options: Of `subprocess.Popen`; by default its output goes nowhere.
        """
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        options = {
            "env": self.environment,
            "cwd": self.work,
            "start_new_session": True,
            "text": True,
            **quiet,
            **options,
        }
        return subprocess.Popen([self.quick_python if quick else sys.executable, *words], **options)

    def until(self, reached: Callable[[], object], process: subprocess.Popen[str]) -> None:
        """Wait for something that a process does; it is required to do it before it ends."""
        end = time.monotonic() + LONGEST
        while not reached():
            hold(process.poll() is None, f"it ended with {process.poll()} before it could be broken")
            hold(time.monotonic() < end, "it hung")
            time.sleep(0.002)

    # ---- Runs ----

    def new(self) -> Path:
        """Return a name for the folder of a run."""
        self._count += 1
        return self.folder / f"run-{self._count}"

    def finish(self, out: Path, *overrides: str, quick: bool = True) -> str:
        """Give the command for a folder (again), let it end, and return the hash of the adapter."""
        process = self.start(*self.command(out, *overrides), quick=quick, stderr=subprocess.PIPE)
        try:
            _, said = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            hold(False, "the same command hung")
        hold(process.returncode == 0, f"the same command ended with {process.returncode}: {said.strip()[-300:]}")
        return sha256(out / "adapter_model.safetensors")

    def said(self, *words: str, code: int = 0, seconds: float = LONGEST, quick: bool = True, **options: Any) -> str:
        """Return what a command prints, which must end with a code and without a traceback within so many seconds."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = self.start("-P", "-m", "qlora_neft", *words, quick=quick, **pipes, **options)
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            hold(False, f"{words[0]} hung")
        hold("Traceback" not in printed, f"a traceback: {printed.strip()[-300:]}")
        hold(process.returncode == code, f"{words[0]} ended with {process.returncode}: {printed.strip()[-300:]}")
        return printed

    @cached_property
    def finished(self) -> Path:
        """The folder of a run that nothing happened to; to be copied, not changed."""
        out = self.new()
        self.finish(out)
        return out

    @cached_property
    def stopped(self) -> Path:
        """The folder of a run that was stopped in the middle, with two sound checkpoints; to be copied, not changed."""
        return self.stop(self.new())

    def stop(self, out: Path, *overrides: str) -> Path:
        """Train into a folder, stop that run in the middle, and return the folder."""
        process = self.start(*self.command(out, *overrides))
        self.until(lambda: last_step(out) > 2 * SAVE_STEPS, process)
        process.send_signal(signal.SIGTERM)
        hold(process.wait(LONGEST) == 128 + signal.SIGTERM, "it was not stopped")
        return out

    def copy(self, folder: Path) -> Path:
        """Copy a folder to a new place, and return that."""
        return Path(shutil.copytree(folder, self.new()))

    @property
    def reference(self) -> str:
        """Hash of the adapter of a run that nothing happened to."""
        return sha256(self.finished / "adapter_model.safetensors")

    def goes_on(self, out: Path, *overrides: str) -> None:
        """Require that the same command ends with the adapter of the run that nothing happened to, byte for byte."""
        hold(self.finish(out, *overrides) == self.reference, "another adapter than that of the undisturbed run")

    def lost(self, out: Path) -> int:
        """Return the steps that were taken and have to be taken again."""
        if (out / "summary.json").exists():
            return 0
        newest = find_checkpoints(out).newest if out.exists() else None
        return max(0, last_step(out) - (newest.step if newest else 0))


def last_step(out: Path) -> int:
    """Return the last step that was logged; 0 before the first."""
    try:
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    except (OSError, ValueError):
        return 0


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
