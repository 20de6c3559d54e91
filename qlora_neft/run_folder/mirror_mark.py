"""What in a mirror's folder is ours, and which folder that is. Nothing else there is replaced, removed or restored.

A mirror may be named on a drive that holds other things. Its own folder is therefore marked with a list of what was
written there, each with its hash: a file that is not on the list, or that has changed since, is the user's. The list
also says whose it is, so that of two runs with one drive neither writes over the other, or begins from it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from ..errors import UserInputError
from ..files import hidden_name, is_inside, read_record_if_there, remove, sha256_of_file, visible, write_json
from .checkpoints import MANIFEST, PREFIX, Checkpoint, files_in, read_manifest, verify

MARK = ".qlora_neft-mirror.json"
VERSION = 1
KEY = "machine.mirror_dir"
# What a new file system, or a drive's own program, puts into an empty folder.
_NOTHING = {"lost+found", ".DS_Store", "desktop.ini", f".{MARK}.part"}


class Mark:
    """The list of what a mirror holds of its run.

    Args:
        folder: The mirror's folder.
        sums: SHA-256 by name of a file, or of a checkpoint's folder, for which it is that of its manifest. Up to two
            of a name, oldest first: the list is written before the file takes its name, so either may be there.
        run: The machine and the folder of the run; empty in a list of an earlier version.

    Raises:
        UserInputError: If the list is there and cannot be read.
    """

    def __init__(self, folder: Path, sums: dict[str, list[str]], run: Mapping[str, str] | None = None) -> None:
        self.folder, self.sums, self.run = folder, sums, dict(run or {})

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the list of a folder, None if the folder is not marked as a mirror.

        Raises:
            UserInputError: If it is damaged.
        """
        path = folder / MARK
        remedy = f"It says what in that folder is the run's. Name another folder in {KEY}, or move this one."
        content = read_record_if_there(path, remedy)
        if content is None:
            return None
        sums = content.get("files")
        sound = isinstance(sums, dict) and all(
            isinstance(found, list) and all(isinstance(sha256, str) for sha256 in found) and name == Path(name).name
            for name, found in sums.items()
        )
        if content.get("mirror_version") != VERSION or not sound:
            raise UserInputError(f"{path}: is not a list of version {VERSION}, which this program reads. {remedy}")
        run = content.get("run")
        return cls(folder, sums, run if isinstance(run, dict) else None)

    def is_of(self, output_dir: Path) -> bool:
        """Return whether the list is that of the run in a folder, which may be gone, as after a session that vanished.

        A folder of another name holds another run; so does one of the same name elsewhere, as long as the one that the
        list is of is still there.
        """
        there = Path(self.run.get("folder", output_dir))
        if there == output_dir or self.run.get("host") != platform.node():
            return there.name == output_dir.name
        return there.name == output_dir.name and not (there.is_dir() and visible(there))

    def write(self) -> None:
        """Write the list.

        Raises:
            OSError: If it cannot be written.
        """
        content = {"mirror_version": VERSION, "files": self.sums, "run": self.run}
        write_json(self.folder / MARK, content, sort_keys=True)

    def add(self, name: str, sha256: str) -> None:
        """Note what is about to take a name.

        Raises:
            OSError: If the list cannot be written.
        """
        before = self.sums.get(name, [])
        if before[-1:] != [sha256]:
            self.sums[name] = [*before[-1:], sha256]
            self.write()

    def has(self, name: str) -> bool:
        """Return whether what has a name is what was written under it; False too if nothing has the name."""
        path, known = self.folder / name, self.sums.get(name, [])
        file = path / MANIFEST if name.startswith(PREFIX) else path
        # Links first: what they lead to was never ours.
        if not known or path.is_symlink() or file.is_symlink() or not file.is_file():
            return False
        return sha256_of_file(file) in known

    def may_write(self, name: str) -> bool:
        """Return whether a name is free, or that of something of ours which holds nothing besides."""
        path = self.folder / name
        if not os.path.lexists(path):
            return True
        return self.has(name) and not (path.is_dir() and _besides(path))

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints of ours that are there, newest first."""
        steps = {name: name.removeprefix(PREFIX) for name in self.sums if name.startswith(PREFIX)}
        numbered = [name for name, step in steps.items() if step.isdecimal() and self.has(name)]
        return sorted(numbered, key=lambda name: int(steps[name]), reverse=True)

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint of ours that is sound."""
        for name in self.checkpoints():
            path = self.folder / name
            if not verify(path):
                manifest = read_manifest(path)
                return Checkpoint(path, manifest.step, manifest.about)
        return None

    def prune(self) -> None:
        """Remove the checkpoints of ours that are older than the newest sound one.

        Raises:
            OSError: If one cannot be renamed, or the list not be written.
        """
        newest = self.newest()
        if newest is None:
            return
        names = self.checkpoints()
        for name in names[names.index(newest.path.name) + 1 :]:
            _remove_checkpoint(self.folder / name)
            del self.sums[name]
        for name in [name for name in self.sums if name.startswith(PREFIX) and not (self.folder / name).exists()]:
            del self.sums[name]  # removed by someone else
        self.write()


def _besides(path: Path) -> list[str]:
    """Return what a checkpoint's folder holds that its manifest does not name."""
    try:
        ours = {MANIFEST, *read_manifest(path).files}
    except ValueError:
        ours = set()
    return [name for name in files_in(path) if name not in ours]


def _remove_checkpoint(path: Path) -> None:
    """Remove the files that a manifest names. What someone put beside them stays, in the folder it is in."""
    if not _besides(path):
        doomed = hidden_name(path, "removed")
        path.rename(doomed)  # a process that is killed halfway leaves no half checkpoint under a checkpoint's name
        remove(doomed)
        return
    names = read_manifest(path).files
    for name in (MANIFEST, *names):  # the manifest first: without it the folder is no checkpoint
        if is_inside(name):
            (path / name).unlink(missing_ok=True)


# ---- Which folder ----


def mirror_place(named: Path, output_dir: Path) -> Path:
    """Return the folder that holds a run's mirror, or will. Nothing is written.

    It is what was named if that is new, empty or marked as this run's; otherwise a folder in it, called as the run's.

    Args:
        named: ``machine.mirror_dir``.
        output_dir: The run's folder.

    Raises:
        UserInputError: If it is the run's folder, inside or around it, or cannot be a mirror.
    """
    named, output_dir = named.expanduser().absolute(), output_dir.absolute()
    inner, outer = named.resolve(), output_dir.resolve()
    if inner == outer:
        raise UserInputError(f"{KEY}: {str(named)!r} is the folder of the run itself. Give another one.")
    for one, other, word in ((inner, outer, "inside"), (outer, inner, "around")):
        if one.is_relative_to(other):
            raise UserInputError(
                f"{KEY}: {str(named)!r} lies {word} the folder of the run, {str(output_dir)!r}. A mirror is a second "
                "place: name a folder beside it, on another disk."
            )
    for place in (named, named / outer.name):
        if _is_free(place, output_dir):
            _check_can_be_made(place)
            return place
    raise UserInputError(
        f"{KEY}: {str(named)!r} holds other files, or another run's, and so does {str(place)!r}, where the mirror "
        "would go. Name a new folder, or an empty one."
    )


def _is_free(place: Path, output_dir: Path) -> bool:
    """Return whether a folder is new, empty, or the run's mirror already."""
    try:
        if not place.exists() or not place.is_dir():
            return True  # a file in its place is said when it is made
        mark = Mark.read(place)
        if mark is not None:
            return mark.is_of(output_dir)
        return not {path.name for path in place.iterdir()} - _NOTHING
    except OSError as error:
        raise UserInputError(f"{KEY}: {str(place)!r} cannot be read ({error.strerror or error}).") from error


def _check_can_be_made(place: Path) -> None:
    nearest = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UserInputError(f"{KEY}: {str(place)!r} cannot be made: {str(nearest)!r} is not a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserInputError(f"{KEY}: {str(place)!r} cannot be made: {str(nearest)!r} cannot be written to.")
