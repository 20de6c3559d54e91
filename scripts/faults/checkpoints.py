"""The newest checkpoint is damaged between two sessions: the one before it is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qlora_neft.run_folder.checkpoints import find_checkpoints

from .bench import SAVE_STEPS, Bench, last_step
from .fault import Fault, hold


def damaged(bench: Bench, damage: Callable[[Path], None]) -> int:
    """Kill in the middle, damage the newest checkpoint, go on."""
    out = bench.new()
    process = bench.start(*bench.command(out))
    bench.until(lambda: last_step(out) > 3 * SAVE_STEPS, process)
    process.kill()
    process.wait()
    newest = find_checkpoints(out).newest
    hold(newest, "no sound checkpoint after three were written")
    assert newest is not None
    damage(newest.path)
    lost = bench.lost(out)
    bench.goes_on(out)
    return lost


def cut_off(checkpoint: Path) -> None:
    """Cut a file in the middle."""
    file = checkpoint / "optimizer.pt"
    os.truncate(file, file.stat().st_size // 2)


def flipped(checkpoint: Path) -> None:
    """Turn one bit over."""
    file = checkpoint / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def zeroed(checkpoint: Path) -> None:
    """Leave zeros in place of a file, as a power cut does."""
    file = checkpoint / "trainer_state.json"
    file.write_bytes(bytes(file.stat().st_size))


def missing(checkpoint: Path) -> None:
    """Take a file away."""
    (checkpoint / "scheduler.pt").unlink()


DAMAGES = {"a file cut off": cut_off, "one bit flipped": flipped, "a file of zeros": zeroed, "a file missing": missing}
FAULTS = [
    Fault("the newest checkpoint is damaged", name, partial(damaged, damage=damage)) for name, damage in DAMAGES.items()
]
