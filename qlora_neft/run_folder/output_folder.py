"""A run's folder: made, claimed for one run at a time, filled from its mirror where a session vanished."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from .checkpoint_files import find_checkpoints
from .lock import run_lock
from .mirror import restore
from .resume import check_same, read_run_file


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
            f"{str(output_dir)!r} cannot be written to ({cause}). {state}. Free space or mend the folder, and run the "
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
        check_same(mirrored["recipe"], recipe, Path(mirror_dir), key="machine.mirror_dir")
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
        return json.loads((output_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserInputError(
            f"--output-dir: {str(output_dir / 'summary.json')!r} cannot be read ({error}). Remove it to finish the run."
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
