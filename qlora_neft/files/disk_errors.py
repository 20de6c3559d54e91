"""What a disk that is full, gone or read-only makes of a write, in the words of every library that writes."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from ..errors import RunFailed

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENOTCONN}
_TORCH_SAVE = ("inline_container", "PytorchStreamWriter", "iostream error")


def disk_problem(error: BaseException) -> str | None:
    """The cause if a disk is to blame for an exception, None if it is not."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _DISK else None
    text = str(error)
    if isinstance(error, SafetensorError) and "os error" in text:
        return text.removeprefix("Error while serializing: ").removeprefix("I/O error: ")
    if isinstance(error, RuntimeError) and any(word in text for word in _TORCH_SAVE):
        return "No space left on device, or it cannot be written to"  # torch.save does not say which
    return None


@contextmanager
def failing_with_the_disk(message: Callable[[str], str]) -> Iterator[None]:
    """Let a command fail with a message where its disk does.

    Args:
        message: Of the cause.

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
