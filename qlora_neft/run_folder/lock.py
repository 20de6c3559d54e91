"""One run at a time in a folder.

The operating system's file lock where there is one: it ends with the process that holds it, however that ended. On
file systems without, the file itself is the lock, and whether its owner is still there is judged by its content.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import UserInputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".run.lock"
STALE_SECONDS = 24 * 60 * 60  # a lock of another machine, which cannot be asked whether the process is still there

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_held: dict[int, Path] = {}  # of this process, by descriptor


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Hold a folder for the time of a block. A forked child does not hold it, and does not release it.

    Args:
        output_dir: An existing folder.

    Raises:
        UserInputError: If another run is writing there.
    """
    path = (output_dir / LOCK).absolute()
    owner = os.getpid()
    descriptor = _acquire(path)
    try:
        yield
    finally:
        if os.getpid() == owner:
            _release(descriptor)


def _acquire(path: Path) -> int:
    while (descriptor := _try_once(path)) is None:
        time.sleep(0.001)
    _held[descriptor] = path
    try:
        _write(descriptor)
    except BaseException:
        _release(descriptor)
        raise
    return descriptor


def _try_once(path: Path) -> int | None:
    """A descriptor of the file, which is ours; None if the file was removed meanwhile."""
    descriptor, is_new = _open(path)
    is_ours = False
    try:
        is_ours = _is_ours(path, descriptor, is_new)
    finally:
        if not is_ours:
            os.close(descriptor)
    return descriptor if is_ours else None


def _release(descriptor: int) -> None:
    """Remove the file while it is still locked: afterwards it could be another's."""
    path = _held.pop(descriptor)
    try:
        if _is_same_file(path, descriptor):
            path.unlink(missing_ok=True)
    finally:
        # A child forked outside of Python may have the descriptor still: closing ours would not end the lock.
        if fcntl is not None:
            _flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, which Python closes in programs that are started, and whether the file was made now."""
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            pass
        except PermissionError as error:
            raise _cannot_lock(path, error) from error
        try:
            return os.open(path, os.O_RDWR), False
        except FileNotFoundError:
            continue  # released between the two
        except PermissionError as error:
            raise _cannot_lock(path, error) from error


def _is_ours(path: Path, descriptor: int, is_new: bool) -> bool:
    """Whether the lock is held now; False to open the file again.

    Raises:
        UserInputError: If another run holds it.
    """
    try:
        supported = fcntl is not None and _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refusal(path, _read(descriptor)) from error
    if supported:
        return _is_same_file(path, descriptor)  # whoever held it may have removed it after it was opened here
    if is_new:
        return True
    _remove_stale(path, descriptor)
    return False


def _flock(descriptor: int, operation: int) -> bool:
    """Whether the file system has such locks."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# ---- What the file says ----


def _write(descriptor: int) -> None:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    body = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, (json.dumps(body) + "\n").encode())


def _read(descriptor: int) -> dict[str, Any]:
    """Empty where there is nothing to read, as in the moment between the file's making and its writing."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        body = json.loads(os.read(descriptor, 4096))
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _refusal(path: Path, body: dict[str, Any], remedy: str = "") -> UserInputError:
    pid, host, started = (body.get(key, "unknown") for key in ("pid", "host", "started"))
    return UserInputError(
        f"{path.parent}: another run (process {pid} on {host}, since {started}) is writing there. "
        f"Wait for it, stop it, or give another --output-dir.{remedy}"
    )


def _cannot_lock(path: Path, error: OSError) -> UserInputError:
    return UserInputError(
        f"{path.parent}: {path.name} cannot be opened ({error.strerror}), and without it another run could write "
        "there too. Give another --output-dir."
    )


# ---- Without locks of the operating system ----


def _remove_stale(path: Path, descriptor: int) -> None:
    """Make way for a new file if the owner of this one is gone.

    Raises:
        UserInputError: If it is not.
    """
    body = _read(descriptor)
    if not _is_stale(path, body, time.time() - os.fstat(descriptor).st_mtime):
        raise _refusal(path, body, f" If that process is gone, remove {path}.")
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return  # another process found it stale too
    if _is_same_file(aside, descriptor):
        aside.unlink()
    else:
        aside.rename(path)  # that other process was faster, and what was moved is its new lock


def _is_stale(path: Path, body: dict[str, Any], age: float) -> bool:
    pid = body.get("pid")
    if body.get("host") != socket.gethostname() or type(pid) is not int or not 0 < pid < 2**31:
        return age > STALE_SECONDS
    if pid == os.getpid():
        return path not in _held.values()  # in a container, a process often gets the number of its predecessor
    if os.name == "nt":
        return False  # there, os.kill ends the process instead of asking after it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # another user's
    return False


def _let_go_in_child() -> None:
    """An orphaned child (a data loader's worker) would keep the lock of a killed run."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
