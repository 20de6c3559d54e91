"""Disks that are full, and then are not."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .bench import LONGEST, Bench
from .fault import Fault, NotTried, hold


@contextmanager
def small_disk(bench: Bench, size: str) -> Generator[Path, None, None]:
    """Mount an empty disk of a size in memory."""
    if os.geteuid() != 0:
        raise NotTried("a small disk can be mounted by root alone")
    mount = bench.new()
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotTried(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=False)


def full(bench: Bench) -> int:
    """A run's disk is full from some checkpoint on, and then has room again."""
    with small_disk(bench, "400k") as disk:
        out = disk / "out"
        process = bench.start(*bench.command(out), stderr=subprocess.PIPE)
        _, said = process.communicate(timeout=LONGEST)
        hold(process.returncode == 1, f"it ended with {process.returncode}")
        hold(said.startswith("failed: ") and said.count("\n") == 1, f"it said {said[-300:]!r}")
        lost = bench.lost(out)
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        bench.goes_on(out)
        return lost


FAULTS = [Fault("a disk that fails", "full while a run trains, then freed", full)]
