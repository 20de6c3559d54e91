"""Mirrors in places that hold other things: nothing of the user's is touched, or brought back as the run's."""

from __future__ import annotations

import shutil
from pathlib import Path

from .bench import Bench, contents
from .fault import Fault, hold


def foreign_files(bench: Bench) -> int:
    """Name a drive with a user's files as the mirror, lose the run's folder, go on."""
    drive, out = bench.new(), bench.new()
    for name in ("checkpoint-3/weights.bin", "summary.json", "tax.pdf", "films/holiday.mp4"):
        (drive / name).parent.mkdir(parents=True, exist_ok=True)
        (drive / name).write_text(f"the user's own {name}")
    own = contents(drive)
    override = f"machine.mirror_dir={drive}"
    bench.stop(out, override)
    hold(_among(own, drive), "files of the user's were touched")
    shutil.rmtree(out)
    bench.goes_on(out, override)
    hold(_among(own, drive), "files of the user's were touched")
    hold(not any((out / name).exists() for name in ("tax.pdf", "films", "checkpoint-3")), "foreign files were restored")
    return 0


def of_another_run(bench: Bench) -> int:
    """Two runs of one recipe name one drive and lose their folders; each gets back what is its own."""
    drive, folders = bench.new(), [bench.new(), bench.new()]
    override = f"machine.mirror_dir={drive}"
    seeds = ("train.seed=3", "train.seed=4")
    for out, seed in zip(folders, seeds, strict=True):
        bench.stop(out, override, seed)
    for out in folders:
        shutil.rmtree(out)
    for out, seed in zip(folders, seeds, strict=True):
        printed = bench.said("train", "mine.yaml", "--output-dir", str(out), override, seed)
        hold("restored from the mirror" in printed, f"nothing was restored: {printed.strip()[-300:]!r}")
    bench.goes_on(folders[0], override, seeds[0])
    return 0


def inside_out(bench: Bench) -> int:
    """A mirror inside the run's folder, and around it: refused before anything is written."""
    out = bench.new()
    for mirror in (out / "mirror", out.parent, out):
        bench.said("train", "mine.yaml", "--output-dir", str(out), f"machine.mirror_dir={mirror}", code=2)
        hold(not out.exists(), "a folder was made")
    return 0


def _among(own: dict[str, str], drive: Path) -> bool:
    return own.items() <= contents(drive).items()


KIND = "a mirror's folder holds other things"
FAULTS = [
    Fault(KIND, "a user's files", foreign_files),
    Fault(KIND, "another run", of_another_run),
    Fault(KIND, "the run itself", inside_out),
]
