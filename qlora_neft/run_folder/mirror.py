"""A second folder, such as a mounted Google Drive, that receives copies of a run's checkpoints and results.

A background thread makes the copies. A mirror that fails is reported and tried again; it never stops a run.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserInputError
from ..files import visible, whole_file, whole_folder
from .checkpoints import Checkpoint, files_in, find_checkpoints, prune, remove_leftovers, verify


class Mirror:
    """Keeps a folder up to date with a run's folder.

    What cannot be copied stays queued, and every later call tries it again.

    Args:
        output_dir: The run's folder.
        mirror_dir: The folder for the copies, for this run alone. It is made once: if it is gone later, the drive is
            gone, and copies into its mount point on the local disk would not be a mirror.
        on_problem: Called once for each kind of failure, from the background thread.

    Raises:
        UserInputError: If both are the same folder.
    """

    def __init__(self, output_dir: Path, mirror_dir: Path, on_problem: Callable[[str], None]) -> None:
        if output_dir.resolve() == mirror_dir.resolve():
            raise UserInputError(f"{mirror_dir}: the mirror is the folder of the run itself. Give another one.")
        self.output_dir, self.mirror_dir, self.on_problem = output_dir.absolute(), mirror_dir.absolute(), on_problem
        self._changed = threading.Condition()  # guards the four attributes below
        self._checkpoint: Path | None = None
        self._files: dict[str, None] = {}  # in the order asked for
        self._calls = 0  # tells whether anyone called while copying
        self._is_working = False
        # Only the background thread uses the following.
        self._reported: set[int | str] = set()
        self._is_made = self._was_mount = False
        self._attempt(self._make)

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
            self._check()
            copy_file(self.output_dir / name, self.mirror_dir / name)

    def _copy_checkpoint(self, path: Path) -> None:
        if not path.is_dir():
            return
        self._check()
        # Those of an earlier session that was killed while copying; only this thread writes there.
        remove_leftovers(self.mirror_dir)
        try:
            with whole_folder(self.mirror_dir / path.name, synced=True) as folder:
                copy_tree(path, folder)
        except OSError:
            if path.is_dir():
                raise
            return  # pruned while it was being copied
        prune(self.mirror_dir, 1)

    def _make(self) -> None:
        self.mirror_dir.mkdir(parents=True, exist_ok=True)
        self._is_made, self._was_mount = True, os.path.ismount(self.mirror_dir)

    def _check(self) -> None:
        """Refuse the empty local folder that remains where a drive was mounted."""
        if not self._is_made:
            self._make()
        elif not self.mirror_dir.is_dir() or (self._was_mount and not os.path.ismount(self.mirror_dir)):
            raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(self.mirror_dir))


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
    for name in files_in(source):
        # Checkpoints may hold folders.
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    # Compared with the manifest that was copied along.
    if wrong := verify(folder):
        raise OSError(errno.EIO, f"the copy of a checkpoint is not sound: {'; '.join(wrong)}", str(source))


def restore(mirror_dir: Path, output_dir: Path) -> Checkpoint | None:
    """Bring back the newest sound checkpoint of a mirror, and the files beside it.

    The checkpoint gets its name last: until then the folder does not look like a run that could be resumed.

    Args:
        mirror_dir: A folder that a `Mirror` kept.
        output_dir: A new folder, or one with nothing but hidden files.

    Returns:
        The checkpoint in ``output_dir``; None if the mirror holds none, in which case nothing is copied.

    Raises:
        UserInputError: If ``output_dir`` holds files.
        OSError: If something cannot be copied; then nothing of it is left.
    """
    found = find_checkpoints(mirror_dir).newest
    if found is None:
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
        names = [path.name for path in visible(mirror_dir) if path.is_file()]
        for name in names:
            copy_file(mirror_dir / name, Path(staged) / name)
        for name in names:
            (Path(staged) / name).replace(output_dir / name)
    return Checkpoint(final, found.step, found.about)
