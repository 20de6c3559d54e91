"""A checkpoint whose hashes are right and whose content is not: the one before it is used, with a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from qlora_neft.files import sha256_of_file
from qlora_neft.run_folder.checkpoints import MANIFEST, FileSum, find_checkpoints, read_manifest, step_folders

from .bench import Bench, last_step
from .fault import Fault, hold


class Pickled:
    """What no checkpoint may bring along."""


def damaged(bench: Bench, damage: Callable[[Path], None]) -> int:
    """Damage the newest checkpoint of a stopped run, seal it again, go on."""
    out = bench.copy(bench.stopped)
    newest = find_checkpoints(out).newest
    hold(newest, "no sound checkpoint")
    assert newest is not None
    damage(newest.path)
    before = read_manifest(step_folders(out)[1]).step
    manifest = read_manifest(newest.path)
    files = {name: newest.path / name for name in manifest.files}
    sums = {name: FileSum(sha256_of_file(path), path.stat().st_size) for name, path in files.items()}
    (newest.path / MANIFEST).write_text(json.dumps(replace(manifest, files=sums).to_dict()))
    printed = bench.said("train", "mine.yaml", "--output-dir", str(out))
    hold(f"{newest.path.name} is damaged and skipped" in printed, "the damage was not said")
    bench.goes_on(out)  # nothing is left to do: compares the adapter
    return last_step(bench.stopped) - before


def _written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _another_step(folder: Path) -> None:
    file = folder / "trainer_state.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"global_step": content["global_step"] + 1}))


def _scheduler_of_zeros(folder: Path) -> None:
    file = folder / "scheduler.pt"
    torch.save({**torch.load(file, weights_only=True), "last_epoch": 0, "_step_count": 0, "_last_lr": [0.0, 0.0]}, file)


def _pickled(folder: Path) -> None:
    torch.save(Pickled(), folder / "optimizer.pt")


DAMAGES = {
    "`trainer_state.json` empty": _written("trainer_state.json", b""),
    "`trainer_state.json` of another step": _another_step,
    "`progress.json` empty": _written("progress.json", b""),
    "a scheduler of zeros": _scheduler_of_zeros,
    "a pickled optimizer": _pickled,
}
KIND = "a checkpoint with right hashes says something wrong"
FAULTS = [Fault(KIND, name, partial(damaged, damage=damage)) for name, damage in DAMAGES.items()]
