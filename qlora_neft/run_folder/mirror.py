"""A second folder, such as a mounted Google Drive, that receives copies of a run's checkpoints and results.

A background thread makes the copies. A mirror that cannot be made is refused before training; one that fails later is
reported and tried again, and never stops a run. What the folder holds besides is left alone (`mirror_mark`).
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserInputError
from ..files import leads_out, sha256_of_file, visible, whole_file, whole_folder
from .checkpoints import MANIFEST, Checkpoint, read_manifest, remove_leftovers, verify
from .mirror_mark import KEY, Mark, mirror_place


class Mirror:
    """Keeps a folder up to date with a run's folder.

    What cannot be copied stays queued, and every later call tries it again.

    Args:
        output_dir: The run's folder.
        mirror_dir: What was named for the copies; `mirror_place` says which folder that is. It is made once: if it is
            gone later, the drive is gone, and copies into its mount point on the local disk would not be a mirror.
        on_problem: Called once for each kind of failure, from the background thread.

    Attributes:
        mirror_dir: The folder that holds the copies.

    Raises:
        UserInputError: If it cannot be made, or is not a place for a mirror of this run.
    """

    def __init__(self, output_dir: Path, mirror_dir: Path, on_problem: Callable[[str], None]) -> None:
        self.output_dir, self.mirror_dir = output_dir.absolute(), mirror_place(mirror_dir, output_dir)
        self.on_problem = on_problem
        self._mark, self._was_mount = _made(self.mirror_dir, self.output_dir)
        self._changed = threading.Condition()  # guards the four attributes below
        self._checkpoint: Path | None = None
        self._files: dict[str, None] = {}  # in the order asked for
        self._calls = 0  # tells whether anyone called while copying
        self._is_working = False
        # Only the background thread uses the following.
        self._reported: set[int | str] = set()

    def checkpoint(self, path: Path) -> None:
        """Queue a finished checkpoint. If several are waiting, only the last is copied; the mirror keeps the newest.

        Args:
            path: The checkpoint's folder. It may vanish at any time, because a newer one is queued or soon will be.
        """
        with self._changed:
            self._checkpoint = path.absolute()
            self._start()

    def files(self, names: Sequence[str]) -> None:
        """Queue files.

        Args:
            names: Files directly in the run's folder. Missing and hidden ones, such as the lock, are skipped.
        """
        with self._changed:
            # A dict and not a set, because it keeps the order.
            self._files.update(dict.fromkeys(name for name in names if not name.startswith(".")))
            self._start()

    def close(self, timeout: float | None = None) -> bool:
        """Try once more what could not be copied, and wait until nothing is queued.

        Args:
            timeout: Maximum seconds to wait, None for no limit.

        Returns:
            Whether everything is in the mirror: False if time ran out, or if something could not be copied.
        """
        with self._changed:
            self._start()
            self._changed.wait_for(lambda: not self._is_working, timeout)
            return not self._is_working and not self._has_work()

    # ---- In the background ----

    def _has_work(self) -> bool:
        return self._checkpoint is not None or bool(self._files)

    def _start(self) -> None:
        self._calls += 1
        if self._has_work() and not self._is_working:
            self._is_working = True
            # A daemon, because a drive that does not answer must not keep the process alive.
            threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def _work(self) -> None:
        try:
            while self._copy_queued():
                pass
        except BaseException:
            self._rest()  # so that the next call starts a new thread
            raise

    def _rest(self) -> None:
        with self._changed:
            self._is_working = False
            self._changed.notify_all()

    def _copy_queued(self) -> bool:
        """Copy what is queued now, and return whether to look again. If not, the next call starts a new thread."""
        with self._changed:
            calls, checkpoint, files = self._calls, self._checkpoint, list(self._files)
            self._checkpoint, self._files = None, {}
        # Copying holds no lock, so the run never waits for a slow drive.
        left = [name for name in files if not self._attempt(self._copy_file, name)]
        failed = checkpoint is not None and not self._attempt(self._copy_checkpoint, checkpoint)
        with self._changed:
            self._files = dict.fromkeys([*left, *self._files])
            if failed and self._checkpoint is None:
                self._checkpoint = checkpoint
            # What failed is tried again by the next call, not here: a drive that is gone would keep this thread
            # spinning.
            if self._has_work() and calls != self._calls:
                return True
            self._rest()
            return False

    def _attempt(self, copy: Callable[..., None], *what: object) -> bool:
        try:
            copy(*what)
        except OSError as error:
            self._report(error)
            return False
        return True

    def _report(self, error: OSError) -> None:
        # A drive that is full or gone fails at every checkpoint: one line for each cause is enough.
        cause = error.errno or str(error)
        if cause not in self._reported:
            self._reported.add(cause)
            self.on_problem(
                f"mirror {self.mirror_dir}: {error.strerror or error} ({error.filename or 'no file named'}). "
                "Training goes on; what is missing there is tried again with the next copy."
            )

    def _copy_file(self, name: str) -> None:
        if (self.output_dir / name).is_file():
            _refuse_link(self.output_dir / name, self.output_dir)
            self._check(name)
            with whole_file(self.mirror_dir / name, synced=True) as draft:
                shutil.copyfile(self.output_dir / name, draft)
                self._mark.add(name, sha256_of_file(draft))

    def _copy_checkpoint(self, path: Path) -> None:
        if not path.is_dir():
            return
        self._check(path.name)
        # Those of an earlier session that was killed while copying; only this thread writes there.
        remove_leftovers(self.mirror_dir)
        try:
            with whole_folder(self.mirror_dir / path.name, synced=True) as folder:
                copy_tree(path, folder)
                self._mark.add(path.name, sha256_of_file(folder / MANIFEST))
        except OSError:
            if path.is_dir():
                raise
            return  # pruned while it was being copied
        self._mark.prune()

    def _check(self, name: str) -> None:
        """Refuse what is not ours to write: a name that is taken, or the local folder where a drive was mounted."""
        if not self.mirror_dir.is_dir() or (self._was_mount and not os.path.ismount(self.mirror_dir)):
            raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(self.mirror_dir))
        if not self._mark.may_write(name):
            raise OSError(f"{name!r} there is not what this run wrote, so it is left as it is; move it to make room")


def _made(place: Path, output_dir: Path) -> tuple[Mark, bool]:
    """Make a mirror's folder and mark it; return the mark, and whether the folder is a drive's mount point."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        mark = Mark.read(place) or Mark(place, {})
        mark.run = {"host": platform.node(), "folder": str(output_dir)}
        mark.write()  # also an old one: whether anything can be written there is known before training
        return mark, os.path.ismount(place)
    except OSError as error:
        raise UserInputError(
            f"{KEY}: {str(place)!r} cannot be made or written to ({error.strerror or error}). Name another folder, or "
            "leave the key out."
        ) from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file whole or not at all, and bring it to the disk.

    Raises:
        OSError: If it cannot be copied.
    """
    with whole_file(target, synced=True) as draft:
        shutil.copyfile(source, draft)


def copy_tree(source: Path, folder: Path) -> None:
    """Copy a checkpoint's files into a folder, and verify them there.

    Raises:
        OSError: If they cannot be copied, or the copy is not sound.
    """
    # By name, not by what lies there: nothing but the checkpoint itself leaves its folder.
    for name in (*_named(source), MANIFEST):
        _refuse_link(source / name, source)
        # Checkpoints may hold folders.
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    # Compared with the manifest that was copied along.
    if wrong := verify(folder):
        raise OSError(errno.EIO, f"the copy of a checkpoint is not sound: {'; '.join(wrong)}", str(source))


def _refuse_link(path: Path, folder: Path) -> None:
    if leads_out(path, folder):
        raise OSError(errno.EPERM, "a link that leads out of the folder is not copied", str(path))


def _named(source: Path) -> list[str]:
    try:
        return list(read_manifest(source).files)
    except ValueError as error:
        raise OSError(errno.EIO, f"a checkpoint is not sound: {error}", str(source)) from error


def restore(mirror_dir: Path, output_dir: Path) -> Checkpoint | None:
    """Bring back the newest sound checkpoint of a mirror, and the run's files beside it; nothing that is not the run's.

    The checkpoint gets its name last: until then the folder does not look like a run that could be resumed.

    Args:
        mirror_dir: The folder that a `Mirror` kept.
        output_dir: A new folder, or one with nothing but hidden files.

    Returns:
        The checkpoint in ``output_dir``; None if the mirror holds none, in which case nothing is copied.

    Raises:
        UserInputError: If ``output_dir`` holds files, or the mirror's list of what is the run's is damaged.
        OSError: If something cannot be copied; then nothing of it is left.
    """
    mark = Mark.read(mirror_dir)
    found = mark.newest() if mark else None
    if mark is None or found is None:
        return None
    output_dir.mkdir(parents=True, exist_ok=True)
    if any(visible(output_dir)):
        raise UserInputError(f"{output_dir}: not empty, and nothing in it may be lost. Give a new folder.")
    final = output_dir / found.path.name
    prefix = f".{final.name}.partial-"  # a name that `remove_leftovers` knows
    # The files take their names inside the block, and the checkpoint takes its own at the end of it.
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=output_dir) as staged,
        whole_folder(final, synced=True) as folder,
    ):
        copy_tree(found.path, folder)
        names = [name for name in mark.sums if (mirror_dir / name).is_file() and mark.has(name)]
        for name in names:
            copy_file(mirror_dir / name, Path(staged) / name)
        for name in names:
            (Path(staged) / name).replace(output_dir / name)
    return Checkpoint(final, found.step, found.about)
