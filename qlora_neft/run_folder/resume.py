"""Decide whether a run starts, resumes, or is over: what its folder holds, compared with what the recipe states."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..disks import check_writable
from ..errors import UserInputError
from ..files import visible, write_json
from ..recipe import Recipe
from .checkpoints import MANIFEST, Checkpoint, Search, find_checkpoints, read_checkpoint
from .finished import check_files, damaged_result, read_run_file, restored_run_file
from .identity import check_same, is_another_base
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
        moved: Lines on what is found in another place than before, to be said when its content was compared.
        changed: Files of a finished result that were changed since, to be set aside before they are written anew.
    """

    checkpoint: Checkpoint | None = None
    earlier: RunFile | None = None
    finished: bool = False
    notes: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The optimizer steps taken when it starts."""
        return self.checkpoint.step if self.checkpoint else 0


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
    check_files(output_dir)
    earlier, notes = _recorded(output_dir)
    if earlier is None and (output_dir / RECIPE_FILE).exists():
        lack = f"and its {RUN_FILE} is damaged" if (output_dir / RUN_FILE).exists() else f"without {RUN_FILE}"
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} holds {_state(output_dir)} {lack}, so it cannot be resumed. Give a new "
            "folder, or remove this one."
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
    moved = check_same(earlier, recipe, output_dir)
    if (output_dir / SUMMARY_FILE).exists():
        beginning = _finished(output_dir, earlier)
        if beginning.finished and is_another_base(earlier, recipe):  # whose weights are not going to be read
            check_same(earlier.model_copy(update={"identity": None}), recipe, output_dir)
        return replace(beginning, notes=notes + beginning.notes, moved=moved)
    check_writable(output_dir, "--output-dir")
    # A place outside this folder is where the run began, given again: by now it has steps of its own.
    if Path(resume).resolve() not in (output_dir.resolve(), *output_dir.resolve().glob("*")):
        resume = "auto"
    beginning = _continued(output_dir, earlier, resume)
    return replace(beginning, notes=notes + beginning.notes, moved=moved)


def _finished(output_dir: Path, earlier: RunFile) -> Beginning:
    """Return the beginning of a finished run: its end, unless the result is not there any more."""
    wrong = damaged_result(output_dir)
    if not wrong:
        return Beginning(earlier=earlier, finished=True)
    check_writable(output_dir, "--output-dir")
    said = "; ".join(f"{name} {why}" for name, why in wrong.items())
    found = _sound(output_dir)
    if found.newest is None:
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} holds a finished run whose result is not as it was written ({said}), "
            f"and no sound checkpoint to make it again from. Put it back, give a new folder, or remove {SUMMARY_FILE} "
            "to train from the beginning."
        )
    again = f"the result is not as it was written ({said}); it is made again from {found.newest.path.name}"
    return Beginning(found.newest, earlier, notes=[*_skipped(found), again], changed=list(wrong))


def _sound(folder: Path) -> Search:
    """Find the newest checkpoint that a trainer can go on from."""
    from .contents import problems  # torch, which those who only claim a folder do without

    return find_checkpoints(folder, problems)


def _skipped(found: Search) -> list[str]:
    return [f"{path.name} is damaged and skipped: {'; '.join(reasons)}" for path, reasons in found.damaged]


def _continued(output_dir: Path, earlier: RunFile, resume: str) -> Beginning:
    named = Path(resume)
    found = _sound(output_dir)
    if resume != "auto" and named.resolve() != output_dir.resolve():
        checkpoint = _read(named)
        # Going back would lose the steps of the newer one, or mix the two.
        if found.newest and found.newest.step > checkpoint.step:
            raise UserInputError(
                f"--resume: {named.name} is not the newest checkpoint of {str(output_dir)!r}, which is "
                f"{found.newest.path.name}. To go back to it, give a new --output-dir."
            )
        return Beginning(checkpoint, earlier)
    notes = _skipped(found)
    if found.newest is None:
        notes.append(f"{output_dir}: no sound checkpoint there; this run begins at step 0")
    return Beginning(found.newest, earlier, notes=notes)


def _from_elsewhere(source: Path, recipe: Recipe) -> Beginning:
    if not source.is_dir():
        raise UserInputError(f"--resume: must be auto, never or a folder, and there is no folder {str(source)!r}.")
    # A checkpoint, whatever its folder is called; otherwise a run's folder.
    if (source / MANIFEST).exists():
        checkpoint, notes = _read(source), []
    else:
        found = _sound(source)
        checkpoint, notes = found.newest, _skipped(found)
    if checkpoint is None:
        raise UserInputError(
            f"--resume: {str(source)!r} holds no sound checkpoint. Name a run's folder or a checkpoint."
        )
    earlier = RunFile.of(checkpoint.about)  # a checkpoint says the same of its run as run.json does
    moved = check_same(earlier, recipe, source, key="--resume")
    return Beginning(checkpoint, earlier, notes=notes, moved=moved)


def _read(path: Path) -> Checkpoint:
    from .contents import problems

    return read_checkpoint(path, problems)


def _state(output_dir: Path) -> str:
    return "a finished run" if (output_dir / SUMMARY_FILE).exists() else "an unfinished run"


# ---- Records ----


def _recorded(output_dir: Path) -> tuple[RunFile | None, list[str]]:
    """Return what is recorded of the run in a folder, None for no run, and lines for the user."""
    earlier = read_run_file(output_dir)
    if earlier is not None or not any((output_dir / name).exists() for name in (RUN_FILE, RECIPE_FILE)):
        return earlier, []
    # Damaged or gone, in the folder of a run: what repeats it stands in.
    what = "is damaged" if (output_dir / RUN_FILE).exists() else "is missing"
    restored = restored_run_file(output_dir)
    if restored is None:
        earlier = read_run_file(output_dir, as_it_is=True)
        note = f"{RUN_FILE} is not as it was written, and nothing repeats it; it is used as it is"
        return earlier, [note] * (earlier is not None)
    return restored[0], [f"{RUN_FILE} {what}; what {restored[1]} repeats of it is used"]


def write_run_file(output_dir: Path, content: Mapping[str, Any]) -> None:
    """Write down what a run is, before it trains."""
    write_json(output_dir / RUN_FILE, content, synced=True)


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
