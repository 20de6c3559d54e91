"""What a disk that is full, gone or read-only makes of a write, in the words of every library that writes."""

from __future__ import annotations

import errno

from safetensors import SafetensorError

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
