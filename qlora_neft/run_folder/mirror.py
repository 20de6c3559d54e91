"""A second folder, such as a mounted Google Drive, that gets a copy of a run's checkpoints and results.

Copies are made in a background thread. A mirror that fails is reported and tried again; it never stops a run.
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
from ..files import whole_file, whole_folder
from .checkpoints import Checkpoint, files_in, find_checkpoints, prune, remove_leftovers, verify


class Mirror:
    """Keeps a folder in step with a run's.

    What could not be copied stays queued, and every later call tries it again.

    Args:
        output_dir: Folder of the run.
        mirror_dir: Folder for the copies, of this run alone. It is made once: a folder that is gone later is a drive
            that is gone, and its mount point on the local disk would be no mirror.
        on_problem: Told once of each kind of failure, from the background thread.

    Raises:
        UserInputError: If both are the same folder.
    """

    def __init__(self, output_dir: Path, mirror_dir: Path, on_problem: Callable[[str], None]) -> None:
        if output_dir.resolve() == mirror_dir.resolve():
            raise UserInputError(f"{mirror_dir}: the mirror is the folder of the run itself. Give another one.")
        self.output_dir, self.mirror_dir, self.on_problem = output_dir.absolute(), mirror_dir.absolute(), on_problem
        self._changed = threading.Condition()  # guards the four below
        self._checkpoint: Path | None = None
        self._files: dict[str, None] = {}  # in the order asked for
        self._calls = 0
        self._is_working = False
        self._reported: set[int | str] = set()  # what follows is of the thread alone
        self._is_made = self._was_mount = False
        self._attempt(self._make)

    def checkpoint(self, path: Path) -> None:
        """Queue a finished checkpoint. Of several that wait, only the last is copied; the mirror keeps the newest.

        Args:
            path: Its folder, which may vanish at any time: then a newer one is queued or about to be.
        """
        with self._changed:
            self._checkpoint = path.absolute()
            self._start()

    def files(self, names: Sequence[str]) -> None:
        """Queue files.

        Args:
            names: Files directly in the run's folder. Missing ones are skipped, and hidden ones, such as its lock.
        """
        with self._changed:
            self._files.update(dict.fromkeys(name for name in names if not name.startswith(".")))
            self._start()

    def close(self, timeout: float | None = None) -> bool:
        """Wait until nothing is queued, after a last attempt at what could not be copied before.

        Args:
            timeout: Seconds to wait at most.

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
            # A daemon: a drive that does not answer must not keep the process from ending.
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
        """Copy what is queued now; whether to look again. If not, the next call starts a new thread."""
        with self._changed:
            calls, checkpoint, files = self._calls, self._checkpoint, list(self._files)
            self._checkpoint, self._files = None, {}
        left = [name for name in files if not self._attempt(self._copy_file, name)]
        failed = checkpoint is not None and not self._attempt(self._copy_checkpoint, checkpoint)
        with self._changed:
            self._files = dict.fromkeys([*left, *self._files])
            if failed and self._checkpoint is None:
                self._checkpoint = checkpoint
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
        remove_leftovers(self.mirror_dir)
        try:
            with whole_folder(self.mirror_dir / path.name, synced=True) as folder:
                copy_tree(path, folder)
        except OSError:
            if path.is_dir():
                raise
            return  # removed while it was copied, as older checkpoints are
        prune(self.mirror_dir, 1)

    def _make(self) -> None:
        self.mirror_dir.mkdir(parents=True, exist_ok=True)
        self._is_made, self._was_mount = True, os.path.ismount(self.mirror_dir)

    def _check(self) -> None:
        """Refuse the local folder that is left where a drive was mounted."""
        if not self._is_made:
            self._make()
        elif not self.mirror_dir.is_dir() or (self._was_mount and not os.path.ismount(self.mirror_dir)):
            raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(self.mirror_dir))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file whole or not at all.

    Raises:
        OSError: If it cannot be copied.
    """
    with whole_file(target, synced=True) as draft:
        shutil.copyfile(source, draft)


def copy_tree(source: Path, folder: Path) -> None:
    """Copy the files of a checkpoint into a folder, and verify them there.

    Raises:
        OSError: If they cannot be copied, or if the copy is not sound.
    """
    for name in files_in(source):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    if wrong := verify(folder):
        raise OSError(errno.EIO, f"the copy of a checkpoint is not sound: {'; '.join(wrong)}", str(source))


def restore(mirror_dir: Path, output_dir: Path) -> Checkpoint | None:
    """Bring back the newest sound checkpoint of a mirror, and the files beside it.

    The checkpoint gets its name last: before it has it, nothing of a run seems to be there to go on from.

    Args:
        mirror_dir: What a `Mirror` kept.
        output_dir: A new folder, or one that holds nothing but hidden files.

    Returns:
        The checkpoint in ``output_dir``; None if the mirror holds none, and then nothing is copied.

    Raises:
        UserInputError: If ``output_dir`` holds files.
        OSError: If something cannot be copied. Nothing is left of it.
    """
    found = find_checkpoints(mirror_dir).newest
    if found is None:
        return None
    output_dir.mkdir(parents=True, exist_ok=True)
    if any(_shown(output_dir)):
        raise UserInputError(f"{output_dir}: not empty, and nothing in it may be lost. Give a new folder.")
    final = output_dir / found.path.name
    prefix = f".{final.name}.partial-"  # a name that `remove_leftovers` knows
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=output_dir) as staged,
        whole_folder(final, synced=True) as folder,
    ):
        copy_tree(found.path, folder)
        names = [path.name for path in _shown(mirror_dir) if path.is_file()]
        for name in names:
            copy_file(mirror_dir / name, Path(staged) / name)
        for name in names:
            (Path(staged) / name).replace(output_dir / name)
    return Checkpoint(final, found.step, found.about)


def _shown(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]
