"""Decide whether a run starts, resumes, or is over: what its folder holds, compared with what the recipe states."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..disks import check_writable
from ..errors import UserInputError
from ..files import read_json, visible, write_json
from ..recipe import Recipe
from ..recipe.settings import learned
from .checkpoints import MANIFEST, Checkpoint, find_checkpoints, read_checkpoint
from .lock import run_lock
from .mirror import restore
from .mirror_mark import KEY, mirror_place
from .record import RECIPE_FILE, RUN_FILE, SUMMARY_FILE, RunFile


@dataclass(frozen=True)
class Beginning:
    """How a run starts.

    Attributes:
        checkpoint: The checkpoint to resume from, None to begin at step 0.
        earlier: What ``run.json`` says of the run so far, None for a new run.
        finished: Whether there is nothing left to do.
        notes: Lines for the user.
    """

    checkpoint: Checkpoint | None = None
    earlier: RunFile | None = None
    finished: bool = False
    notes: list[str] = field(default_factory=list)


def find_beginning(output_dir: Path, recipe: Recipe, resume: str = "auto") -> Beginning:
    """Find out how a run starts. Nothing is written.

    Args:
        output_dir: The run's folder.
        recipe: What the run is to learn.
        resume: ``auto`` resumes this recipe's run if the folder holds one; ``never`` accepts a new folder only;
            anything else is the folder of a run, or a checkpoint, to start from in a new folder.

    Raises:
        UserInputError: If the folder holds anything else, or another recipe's run (the difference is shown).
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserInputError(f"--output-dir: {str(output_dir)!r} is a file. Give a new folder.")
    # Hidden names do not count as content: a lock, or what a killed process left, is no reason to refuse a folder.
    if not output_dir.exists() or not visible(output_dir):
        check_writable(output_dir, "--output-dir")
        return Beginning() if resume in ("auto", "never") else _from_elsewhere(Path(resume), recipe)
    earlier = read_run_file(output_dir)
    if earlier is None and (output_dir / RECIPE_FILE).exists():
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} holds {_state(output_dir)} without {RUN_FILE}, so it cannot be "
            "resumed. Give a new folder, or remove this one."
        )
    if earlier is None:
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} is not empty, and nothing in it may be lost. Give a new folder."
        )
    if resume == "never":
        raise UserInputError(
            f"--resume never: {str(output_dir)!r} holds {_state(output_dir)}. Give a new folder, or remove this one."
        )
    # Before the question whether it is finished: another recipe's result must not pass for this one's.
    check_same(earlier, recipe, output_dir)
    if (output_dir / SUMMARY_FILE).exists():
        return Beginning(earlier=earlier, finished=True)
    check_writable(output_dir, "--output-dir")
    # A place outside this folder is where the run began, given again: by now it has steps of its own.
    if Path(resume).resolve() not in (output_dir.resolve(), *output_dir.resolve().glob("*")):
        resume = "auto"
    return _continued(output_dir, earlier, resume)


def _continued(output_dir: Path, earlier: RunFile, resume: str) -> Beginning:
    named = Path(resume)
    found = find_checkpoints(output_dir)
    if resume != "auto" and named.resolve() != output_dir.resolve():
        checkpoint = read_checkpoint(named)
        # Going back would lose the steps of the newer one, or mix the two.
        if found.newest and found.newest.step > checkpoint.step:
            raise UserInputError(
                f"--resume: {named.name} is not the newest checkpoint of {str(output_dir)!r}, which is "
                f"{found.newest.path.name}. To go back to it, give a new --output-dir."
            )
        return Beginning(checkpoint, earlier)
    notes = [f"{path.name} is damaged and skipped: {'; '.join(reasons)}" for path, reasons in found.damaged]
    if found.newest is None:
        notes.append(f"{output_dir}: no sound checkpoint there; this run begins at step 0")
    return Beginning(found.newest, earlier, notes=notes)


def _from_elsewhere(source: Path, recipe: Recipe) -> Beginning:
    if not source.is_dir():
        raise UserInputError(f"--resume: must be auto, never or a folder, and there is no folder {str(source)!r}.")
    # A checkpoint, whatever its folder is called; otherwise a run's folder.
    if (source / MANIFEST).exists():
        checkpoint, notes = read_checkpoint(source), []
    else:
        found = find_checkpoints(source)
        checkpoint, notes = found.newest, [f"{path.name} is damaged and skipped" for path, _ in found.damaged]
    if checkpoint is None:
        raise UserInputError(
            f"--resume: {str(source)!r} holds no sound checkpoint. Name a run's folder or a checkpoint."
        )
    earlier = RunFile.of(checkpoint.about)  # a checkpoint says the same of its run as run.json does
    check_same(earlier, recipe, source, key="--resume")
    return Beginning(checkpoint, earlier, notes=notes)


def _state(output_dir: Path) -> str:
    return "a finished run" if (output_dir / SUMMARY_FILE).exists() else "an unfinished run"


# ---- The same run ----


def check_same(before: RunFile, recipe: Recipe, where: Path, key: str = "--output-dir") -> None:
    """Refuse to continue a run under a recipe that learns something else.

    Args:
        before: What is recorded of the run. Its recipe is compared as it was written: a key that only another version
            knows makes another run.
        recipe: What is to be learned now.
        where: The folder of the run.
        key: The option that names the folder.

    Raises:
        UserInputError: With every key that differs.
    """
    old, new = learned(before.recipe or {}), recipe.learned()
    different = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if different:
        lines = [f"  {name}: {json.dumps(old.get(name))} before, {json.dumps(new.get(name))} now" for name in different]
        raise UserInputError(
            f"{key}: {str(where)!r} holds a run that learns something else:\n" + "\n".join(lines) + "\n"
            f"Only the machine section may change during a run. Use that run's recipe, or give a new {key}."
        )


def check_identity(
    earlier: RunFile | None, *, data_sha256: str, base_sha256: str, adapter_sha256: str | None = None
) -> None:
    """Refuse to continue a run with other data, base or adapter than it began with.

    Raises:
        UserInputError: If one of them has changed.
    """
    if earlier is None:
        return
    for key, what, before, now in (
        ("data.path", "rows", earlier.data_sha256, data_sha256),
        ("model.name_or_path", "weights", earlier.base_sha256, base_sha256),
        ("model.adapter", "weights", earlier.adapter_sha256, adapter_sha256),
    ):
        if before not in (None, now):  # None: not recorded, as in a damaged file
            raise UserInputError(
                f"{key}: the {what} are not those this run began with. Put them back (a revision pins them), or give a "
                "new --output-dir."
            )


# ---- Records ----


def read_run_file(output_dir: Path) -> RunFile | None:
    """Return what ``run.json`` says of a run, as far as it can be read; None if it names no recipe."""
    try:
        content = read_json(output_dir / RUN_FILE)
    except (OSError, ValueError):
        return None
    found = RunFile.of(content) if isinstance(content, dict) else RunFile()
    return None if found.recipe is None else found


def write_run_file(output_dir: Path, content: Mapping[str, Any]) -> None:
    """Write down what a run is, before it trains."""
    write_json(output_dir / RUN_FILE, content)


def read_summary(output_dir: Path) -> dict[str, Any]:
    """Return the content of a finished run's ``summary.json``.

    Raises:
        UserInputError: If it is damaged.
    """
    try:
        return read_json(output_dir / SUMMARY_FILE)
    except (OSError, ValueError) as error:
        raise UserInputError(
            f"--output-dir: {str(output_dir / SUMMARY_FILE)!r} cannot be read ({error}). Remove it to finish the run."
        ) from error


# ---- The folder ----


@contextmanager
def claimed(output_dir: Path) -> Generator[None, None, None]:
    """Lock a folder for this run. Folders made for it are removed again if nothing was written.

    Raises:
        UserInputError: If another run is writing there, or the folder cannot be made.
    """
    made = _make(output_dir)
    try:
        with run_lock(output_dir):
            yield
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _make(output_dir: Path) -> list[Path]:
    """Make a folder and return those that had to be made for it, innermost first."""
    # Innermost first, the order in which they can be removed again.
    missing = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserInputError(f"--output-dir: {str(output_dir)!r} cannot be made ({error.strerror}).") from error
    return missing


def disk_message(output_dir: Path) -> Callable[[str], str]:
    """Return a function that makes the message for a run whose disk fails, from the cause."""

    def message(cause: str) -> str:
        newest = find_checkpoints(output_dir).newest
        state = f"The checkpoint of step {newest.step} is sound" if newest else "There is no checkpoint yet"
        return (
            f"{str(output_dir)!r} cannot be written to ({cause}). {state}. Free space or fix the folder, and run the "
            "same command again."
        )

    return message


def stopped_early(output_dir: Path) -> str:
    """Return the message for a run that a signal ended before it had anything to save."""
    newest = find_checkpoints(output_dir).newest
    state = f"the checkpoint of step {newest.step} is sound" if newest else "nothing was trained yet, so none is lost"
    return f"stopped before a step was taken; {state}. To go on, run the same command again."


def restore_from_mirror(mirror_dir: str | None, output_dir: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Bring back what a mirror holds if the run's own folder is gone, as after a session whose disk vanished.

    Raises:
        UserInputError: If there can be no mirror where it is named, if it is that of another recipe's run, or cannot be
            copied back.
    """
    if mirror_dir is None:
        return
    named = Path(mirror_dir).expanduser()
    place = mirror_place(named, output_dir)
    shown = mirror_dir if place == named.absolute() else str(place)
    if shown != mirror_dir:
        say(f"{KEY}: {mirror_dir} holds other files, which are left alone; the mirror is {place}")
    # Checked even if nothing is restored: the run is going to write there.
    if not place.is_dir():
        return
    mirrored = read_run_file(place)
    if mirrored is not None:
        check_same(mirrored, recipe, Path(shown), key=KEY)
    if output_dir.exists() and (not output_dir.is_dir() or visible(output_dir)):
        return
    # Claimed: the same command, started twice, must not restore twice at once.
    with claimed(output_dir):
        try:
            found = restore(place, output_dir)
        except OSError as error:
            raise UserInputError(
                f"{KEY}: {str(place)!r} cannot be restored to {str(output_dir)!r} ({error}). Remove the cause, and run "
                "the same command again."
            ) from error
    if found is not None:
        say(f"restored from the mirror {shown}: checkpoint of step {found.step}")
