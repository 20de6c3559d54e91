"""One run at a time in a folder.

Where the operating system locks files, that lock is used: it ends with the process that holds it, however that process
ends. On file systems without such locks the file itself is the lock, and its content tells whether its owner is alive.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from ..errors import UserInputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".run.lock"
STALE_SECONDS = 24 * 60 * 60  # for a lock of another machine, whose processes cannot be looked up from here

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_held: dict[int, Path] = {}  # the locks this process holds, by descriptor


@contextmanager
def run_lock(output_dir: Path) -> Generator[None, None, None]:
    """Lock a folder for the length of a block. A forked child neither holds the lock nor releases it.

    Args:
        output_dir: An existing folder.

    Raises:
        UserInputError: If another run is writing there.
    """
    path = (output_dir / LOCK).absolute()  # the current directory may change during the run
    owner = os.getpid()
    descriptor = _acquire(path)
    try:
        yield
    finally:
        if os.getpid() == owner:
            _release(descriptor)


def _acquire(path: Path) -> int:
    # None only if a holder has just let go, or a stale file is gone: the next try decides.
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
    """Return a descriptor of the lock file, which is ours now; None if the file was removed in the meantime."""
    descriptor, is_new = _open(path)
    is_ours = False
    try:
        is_ours = _is_ours(path, descriptor, is_new)
    finally:
        if not is_ours:
            os.close(descriptor)
    return descriptor if is_ours else None


def _release(descriptor: int) -> None:
    """Remove the file while it is still locked: afterwards it could be another run's."""
    path = _held.pop(descriptor)
    try:
        if _is_same_file(path, descriptor):
            path.unlink(missing_ok=True)
    finally:
        # A child forked outside Python may still have the descriptor, and then closing ours would not end the lock.
        if fcntl is not None:
            _flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    """Open the lock file; return a descriptor, which started programs do not inherit, and whether the file is new."""
    while True:
        try:
            # Exclusive, to learn whether the file is new: without file locks, whoever makes it has the lock.
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            pass
        except PermissionError as error:
            raise _cannot_lock(path, error) from error
        if os.path.lexists(path) and not path.is_file():  # a folder, a pipe, a link to nothing
            raise UserInputError(
                f"{path.parent}: {path.name} is not a file, so this run cannot be told from another one. Remove it."
            )
        try:
            return os.open(path, os.O_RDWR), False
        except FileNotFoundError:
            continue  # released between the two calls
        except PermissionError as error:
            raise _cannot_lock(path, error) from error


def _is_ours(path: Path, descriptor: int, is_new: bool) -> bool:
    """Return whether the lock is held now; False means to open the file again.

    Raises:
        UserInputError: If another run holds it.
    """
    try:
        supported = fcntl is not None and _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refusal(path, _read(descriptor)) from error
    if supported:
        return _is_same_file(path, descriptor)  # whoever held it may have removed it after we opened it
    if is_new:
        return True
    _remove_stale(path, descriptor)
    return False


def _flock(descriptor: int, operation: int) -> bool:
    """Lock or unlock the file; return False if its file system has no such locks."""
    assert fcntl is not None, "callers look before"
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


# ---- The file's content ----


@dataclass(frozen=True)
class _Owner:
    """The process that a lock file names. A damaged file, or one not written yet, may hold anything or nothing."""

    pid: object = None
    host: object = None
    started: object = None


def _write(descriptor: int) -> None:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    owner = _Owner(os.getpid(), socket.gethostname(), started)
    # In place, since a rename would leave the lock on the old file.
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, (json.dumps(asdict(owner)) + "\n").encode())


def _read(descriptor: int) -> _Owner:
    """Return the owner; unknown if there is none to read, as in the moment between making the file and writing it."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        body = json.loads(os.read(descriptor, 4096))
    except ValueError:
        return _Owner()
    known = body if isinstance(body, dict) else {}
    return _Owner(known.get("pid"), known.get("host"), known.get("started"))


def _refusal(path: Path, owner: _Owner, remedy: str = "") -> UserInputError:
    pid, host, started = ("unknown" if value is None else value for value in (owner.pid, owner.host, owner.started))
    return UserInputError(
        f"{path.parent}: another run (process {pid} on {host}, since {started}) is writing there. "
        f"Wait for it, stop it, or give another --output-dir.{remedy}"
    )


def _cannot_lock(path: Path, error: OSError) -> UserInputError:
    return UserInputError(
        f"{path.parent}: {path.name} cannot be opened ({error.strerror}), and without it another run could write "
        "there too. Give another --output-dir."
    )


# ---- File systems without locks ----


def _remove_stale(path: Path, descriptor: int) -> None:
    """Remove a lock file whose owner is gone.

    Raises:
        UserInputError: If the owner is not gone.
    """
    owner = _read(descriptor)
    if not _is_stale(path, owner, time.time() - os.fstat(descriptor).st_mtime):
        raise _refusal(path, owner, f" If that process is gone, remove {path}.")
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return  # another process found it stale as well
    if _is_same_file(aside, descriptor):
        aside.unlink()
    else:
        aside.rename(path)  # that process was faster, and what we moved is its new lock


def _is_stale(path: Path, owner: _Owner, age: float) -> bool:
    pid = owner.pid
    # Another machine's processes cannot be looked up, nor can numbers that os.kill takes for groups: go by the age.
    if owner.host != socket.gethostname() or type(pid) is not int or not 0 < pid < 2**31:
        return age > STALE_SECONDS
    if pid == os.getpid():
        return path not in _held.values()  # in containers a process often gets the number of its predecessor
    if os.name == "nt":
        return False  # on Windows, os.kill ends the process instead of looking for it
    try:
        os.kill(pid, 0)  # signal 0 only asks whether the process exists
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # alive, and another user's
    return False


def _let_go_in_child() -> None:
    """Close the locks in a forked child: an orphan, such as a data loader's worker, would keep a killed run's lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
