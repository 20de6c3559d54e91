"""Disks that are full or cannot be written to: found out before the work where that can be, and told in one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import RunFailed, UserInputError

# Errors of a disk, as opposed to those of a path that the user can correct.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENOTCONN}
# Those of a path, whatever it was for.
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR}
# Words of the RuntimeErrors by which torch.save reports a failed write. None of them names the cause.
_TORCH_SAVE = ("inline_container", "PytorchStreamWriter", "iostream error")


def check_writable(path: Path, key: str) -> None:
    """Refuse a place that cannot be written to before hours are spent on what goes there; nothing is made.

    Args:
        path: A file or folder, which need not exist, nor the folders above it.
        key: What the user wrote it for.

    Raises:
        UserInputError: If the nearest folder that exists cannot be written to.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if nearest.is_file() and nearest == path:
        nearest = path.absolute().parent  # a file is replaced, not written to
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "cannot be written to" if nearest.is_dir() else "is a file"
        raise UserInputError(f"{key}: {str(path)!r} cannot be made: {str(nearest)!r} {what}.")


def disk_problem(error: BaseException) -> str | None:
    """Return the cause of an exception if a disk is to blame, otherwise None."""
    if isinstance(error, OSError):
        # A path that is missing or forbidden is for the user to correct.
        return error.strerror if error.errno in _DISK else None
    # Neither library raises an OSError: safetensors passes on the words of Rust's error ("... (os error 28)").
    text = str(error)
    if isinstance(error, SafetensorError) and "os error" in text:
        return text.removeprefix("Error while serializing: ").removeprefix("I/O error: ")
    if isinstance(error, RuntimeError) and any(word in text for word in _TORCH_SAVE):
        return "No space left on device, or it cannot be written to"  # torch.save does not say which
    return None


def told_of_disk(error: BaseException) -> UserInputError | RunFailed | None:
    """Return an error that the user can read in place of one of a file system; None for any other, a bug of ours."""
    cause = disk_problem(error)
    where = getattr(error, "filename", None)
    place = "a file" if where is None else f"{str(where)!r}"
    if cause is not None:
        return RunFailed(
            f"{place} cannot be written to ({cause}). Free space or fix the folder, and run the same command again."
        )
    if isinstance(error, OSError) and where is not None and error.errno in _FORBIDDEN:
        return UserInputError(f"{place}: {error.strerror}. Give another place, or change its rights.")
    return None


@contextmanager
def failing_with_the_disk(message: Callable[[str], str]) -> Generator[None, None, None]:
    """Turn the errors of a failing disk into a message that ends the command.

    Args:
        message: Makes it from the cause.

    Raises:
        RunFailed: In place of the errors of a disk that is full or cannot be written to.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = disk_problem(error)
        if cause is None:
            raise
        raise RunFailed(message(cause)) from error
