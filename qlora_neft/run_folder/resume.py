"""Whether a run begins, goes on, or is over: what a folder holds against what a recipe states."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from ..files import read_json, write_json
from ..recipe.settings import learned
from .checkpoints import MANIFEST, Checkpoint, find_checkpoints, read_checkpoint
from .lock import run_lock
from .mirror import restore
from .record import RECIPE_FILE, RUN_FILE, SUMMARY_FILE, RunFile


@dataclass(frozen=True)
class Beginning:
    """How a run starts.

    Attributes:
        checkpoint: To go on from, None to begin at step 0.
        earlier: What ``run.json`` says of the run so far, None for a new one.
        finished: Whether there is nothing left to do.
        notes: Lines for the user.
    """

    checkpoint: Checkpoint | None = None
    earlier: RunFile | None = None
    finished: bool = False
    notes: list[str] = field(default_factory=list)


def find_beginning(output_dir: Path, recipe: Mapping[str, Any], resume: str = "auto") -> Beginning:
    """Look at a folder; nothing is written.

    Args:
        output_dir: Where the run writes.
        recipe: `Recipe.to_dict`.
        resume: ``auto`` goes on with this recipe's run if the folder holds one; ``never`` wants a new folder; else a
            run's folder or a checkpoint to go on from in a new folder.

    Raises:
        UserInputError: If the folder holds anything else, or another recipe's run (the difference is shown).
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserInputError(f"--output-dir: {str(output_dir)!r} is a file. Give a new folder.")
    if not _is_occupied(output_dir):
        _check_writable(output_dir)
        return Beginning() if resume in ("auto", "never") else _from_elsewhere(Path(resume), recipe)
    earlier = read_run_file(output_dir)
    if earlier is None and (output_dir / RECIPE_FILE).exists():
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} holds {_state(output_dir)}, without {RUN_FILE} to go on from. Give a "
            "new folder, or remove this one."
        )
    if earlier is None:
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} is not empty, and nothing in it may be lost. Give a new folder."
        )
    if resume == "never":
        raise UserInputError(
            f"--resume never: {str(output_dir)!r} holds {_state(output_dir)}. Give a new folder, or remove this one."
        )
    check_same(earlier.recipe or {}, recipe, output_dir)
    if (output_dir / SUMMARY_FILE).exists():
        return Beginning(earlier=earlier, finished=True)
    _check_writable(output_dir)
    if Path(resume).resolve() not in (output_dir.resolve(), *output_dir.resolve().glob("*")):
        resume = "auto"  # auto, or a place this run went on from when it began: it has steps of its own by now
    return _continued(output_dir, earlier, resume)


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: Path, key: str = "--output-dir") -> None:
    """Refuse to go on with a run under a recipe that learns something else.

    Raises:
        UserInputError: With every key that differs.
    """
    old, new = learned(before), learned(now)
    different = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if different:
        lines = [f"  {key}: {json.dumps(old.get(key))} before, {json.dumps(new.get(key))} now" for key in different]
        raise UserInputError(
            f"{key}: {str(where)!r} holds a run that learns something else:\n" + "\n".join(lines) + "\n"
            f"Only the machine section may change on the way. Take the recipe of that run, or give a new {key}."
        )


def read_run_file(output_dir: Path) -> RunFile | None:
    """Return what ``run.json`` says of a run, as far as it can be read; None if it names no recipe."""
    try:
        content = read_json(output_dir / RUN_FILE)
    except (OSError, ValueError):
        return None
    found = RunFile.of(content) if isinstance(content, dict) else RunFile()
    return None if found.recipe is None else found


def write_run_file(output_dir: Path, content: dict[str, Any]) -> None:
    """Note what a run is, before it trains."""
    write_json(output_dir / RUN_FILE, content)


def check_identity(earlier: RunFile | None, *, data_sha256: str, base_sha256: str) -> None:
    """See that data and base are still those the run began with.

    Raises:
        UserInputError: If one is another.
    """
    if earlier is None:
        return
    for key, what, before, now in (
        ("data.path", "rows", earlier.data_sha256, data_sha256),
        ("model.name_or_path", "weights", earlier.base_sha256, base_sha256),
    ):
        if before not in (None, now):
            raise UserInputError(
                f"{key}: the {what} are not those this run began with. Put them back (a revision pins them), or give a "
                "new --output-dir."
            )


def _continued(output_dir: Path, earlier: RunFile, resume: str) -> Beginning:
    named = Path(resume)
    found = find_checkpoints(output_dir)
    if resume != "auto" and named.resolve() != output_dir.resolve():
        checkpoint = read_checkpoint(named)
        if found.newest and found.newest.step > checkpoint.step:
            raise UserInputError(
                f"--resume: {named.name} is not the newest checkpoint of {str(output_dir)!r}, which is "
                f"{found.newest.path.name}. To go back, give a new --output-dir."
            )
        return Beginning(checkpoint, earlier)
    notes = [f"{path.name} is damaged and left out: {'; '.join(reasons)}" for path, reasons in found.damaged]
    if found.newest is None:
        notes.append(f"{output_dir}: no sound checkpoint there; this run begins at step 0")
    return Beginning(found.newest, earlier, notes=notes)


def _from_elsewhere(source: Path, recipe: Mapping[str, Any]) -> Beginning:
    if not source.is_dir():
        raise UserInputError(f"--resume: must be auto, never or a folder, and there is no folder {str(source)!r}.")
    if (source / MANIFEST).exists():
        checkpoint, notes = read_checkpoint(source), []
    else:
        found = find_checkpoints(source)
        checkpoint, notes = found.newest, [f"{path.name} is damaged and left out" for path, _ in found.damaged]
    if checkpoint is None:
        raise UserInputError(
            f"--resume: {str(source)!r} holds no sound checkpoint. Name a run's folder or a checkpoint."
        )
    earlier = RunFile.of(checkpoint.about)  # a checkpoint says what its run's file does
    check_same(earlier.recipe or {}, recipe, source, key="--resume")
    return Beginning(checkpoint, earlier, notes=notes)


def _is_occupied(output_dir: Path) -> bool:
    return output_dir.exists() and any(not path.name.startswith(".") for path in output_dir.iterdir())


def _state(output_dir: Path) -> str:
    return "a finished run" if (output_dir / SUMMARY_FILE).exists() else "a run that did not finish"


def _check_writable(output_dir: Path) -> None:
    """Find out before hours of training, without making anything."""
    nearest = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "cannot be written to" if nearest.is_dir() else "is a file"
        raise UserInputError(f"--output-dir: {str(output_dir)!r} cannot be made: {str(nearest)!r} {what}.")


@contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Hold a folder for this run alone; folders made for it go again if nothing was written.

    Raises:
        UserInputError: If another run is writing there.
    """
    made = _make(output_dir)
    try:
        with run_lock(output_dir):
            yield
    finally:
        for folder in made:  # the innermost first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def disk_message(output_dir: Path) -> Callable[[str], str]:
    """What to say of a run whose disk fails, by the cause."""

    def message(cause: str) -> str:
        newest = find_checkpoints(output_dir).newest
        state = f"The checkpoint of step {newest.step} is sound" if newest else "There is no checkpoint yet"
        return (
            f"{str(output_dir)!r} cannot be written to ({cause}). {state}. Free space or fix the folder, and run the "
            "same command again."
        )

    return message


def restore_from_mirror(
    mirror_dir: str | None, output_dir: Path, recipe: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Bring back what a mirror holds, where the folder itself is gone: the session that had it vanished.

    Raises:
        UserInputError: If the mirror is that of another recipe's run.
    """
    if mirror_dir is None or not Path(mirror_dir).expanduser().is_dir():
        return
    mirrored = read_run_file(Path(mirror_dir).expanduser())
    if mirrored is not None:
        check_same(mirrored.recipe or {}, recipe, Path(mirror_dir), key="machine.mirror_dir")
    if output_dir.exists() and (not output_dir.is_dir() or _visible(output_dir)):
        return
    with claimed(output_dir):
        try:
            found = restore(Path(mirror_dir).expanduser(), output_dir)
        except OSError as error:
            raise UserInputError(
                f"machine.mirror_dir: {mirror_dir!r} cannot be restored to {str(output_dir)!r} ({error}). Free the "
                "cause, and run the same command again."
            ) from error
    if found is not None:
        say(f"restored from the mirror {mirror_dir}: checkpoint of step {found.step}")


def read_summary(output_dir: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        UserInputError: If it is damaged.
    """
    try:
        return read_json(output_dir / SUMMARY_FILE)
    except (OSError, ValueError) as error:
        raise UserInputError(
            f"--output-dir: {str(output_dir / SUMMARY_FILE)!r} cannot be read ({error}). Remove it to finish the run."
        ) from error


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, leftovers of a process that was killed not counted."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _make(output_dir: Path) -> list[Path]:
    """Folders that had to be made, the innermost first."""
    missing = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserInputError(f"--output-dir: {str(output_dir)!r} cannot be made ({error.strerror}).") from error
    return missing
