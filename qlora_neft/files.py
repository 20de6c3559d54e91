"""Files: written whole or not at all, read as records, hashed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import UserInputError
from .yaml_budget import MAX_NODES, check_budget

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What file systems say that have no fsync; every other error is a real one.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

# ---- Whole or not at all ----
#
# What is written gets a hidden name first and is renamed when it is complete. A reader, or a process that is killed
# at any moment, finds the old content or the new one under the name, never a part of it.


@contextmanager
def whole_file(path: Path, *, synced: bool = False, keep_draft: bool = False) -> Generator[Path, None, None]:
    """Yield a hidden file beside ``path`` to write to, and rename it to ``path`` at the end of the block.

    Args:
        path: A name in an existing folder.
        synced: Whether the content is on the disk before it gets its name. Slow, and what survives a power failure.
        keep_draft: Whether an exception leaves the hidden file as it is; otherwise it is removed.

    Raises:
        OSError: If it cannot be brought to the disk or renamed.
    """
    # Beside the target, since a rename is atomic only within one file system; always of the same name, so that the next
    # attempt overwrites what a killed process left.
    draft = path.with_name(f".{path.name}.part")
    try:
        yield draft
        if synced:
            sync(draft)
        draft.replace(path)
        if synced:
            sync(path.parent)  # fsync of a file says nothing of its name
    # BaseException, since Ctrl-C must not leave a draft either.
    except BaseException as error:
        if not keep_draft:
            with suppress(OSError):  # the error that is on its way is the one to report
                draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(draft), draft):
            error.filename = str(path)  # what the user knows; a failed write names no file at all
        raise


@contextmanager
def whole_folder(path: Path, *, synced: bool = False) -> Generator[Path, None, None]:
    """Yield a new hidden folder beside ``path`` to write into, and rename it to ``path`` at the end of the block.

    Whatever has the name is replaced. If an exception leaves the block, the new folder is removed. What killed
    processes left beside ``path`` is swept first.

    Args:
        path: A name in an existing folder.
        synced: Whether every file is on the disk before the folder gets its name.

    Raises:
        OSError: If it cannot be made, brought to the disk or renamed.
    """
    sweep_beside(path)
    # A new name each time: a folder that a killed process left would still hold its files.
    draft = hidden_name(path, "partial")
    try:
        with new_held(draft):
            yield draft
        give_usual_mode(draft.rglob("*"))
        if synced:
            sync_all(draft)
        put_folder(draft, path, synced=synced)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def give_usual_mode(paths: Iterable[Path]) -> None:
    """Give files the mode that any new file of this process has: safetensors makes its own for their owner alone."""
    umask = os.umask(0o077)  # there is no other way to ask; files made meanwhile are too private, not too open
    os.umask(umask)
    for path in paths:
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):  # a file system without modes
                path.chmod(0o666 & ~umask)


def put_folder(draft: Path, path: Path, *, synced: bool = False) -> None:
    """Rename a folder, replacing whatever has the name.

    A folder cannot be renamed over a non-empty one, so the old one is moved aside first, and back if renaming fails.

    Args:
        draft: A folder beside ``path``.
        path: Its new name.
        synced: Whether the new name is on the disk before the old content is removed.

    Raises:
        OSError: If it cannot be renamed; then all is as before.
    """
    # lexists: a dangling link has the name too.
    old = hidden_name(path, "replaced") if os.path.lexists(path) else None
    if old:
        path.rename(old)
    try:
        draft.rename(path)
    except OSError:
        if old:
            old.rename(path)  # so that a failure leaves the old content in place
        raise
    # Before the new name is on the disk, a power failure could lose both: the old content goes after it.
    if synced:
        sync(path.parent)
    if old:
        remove(old)


@contextmanager
def whole_files(folder: Path) -> Generator[Path, None, None]:
    """Yield a hidden folder inside ``folder``; at the end of the block its files are synced and moved out of it.

    Each file is replaced whole or not at all, and all of them are on the disk before the first gets its name. What else
    ``folder`` holds stays as it is. If an exception leaves the block, nothing has changed.

    Args:
        folder: An existing folder.

    Raises:
        OSError: If they cannot be written, brought to the disk or renamed.
    """
    final = folder / "files"  # a name for the draft alone
    sweep_beside(final)
    draft = hidden_name(final, "partial")
    try:
        with new_held(draft):
            yield draft
            sync_all(draft)
            for path in sorted(path for path in draft.rglob("*") if path.is_file()):
                target = folder / path.relative_to(draft)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
            sync(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sync_all(folder: Path) -> None:
    """Wait until all of a folder is on the disk."""
    # Folders as well: fsync of a file says nothing of its name, which is in the folder.
    for entry in (*folder.rglob("*"), folder):
        sync(entry)


def hidden_name(path: Path, why: str) -> Path:
    """Return a new hidden name beside ``path`` that says what it is for."""
    # Process numbers repeat, in containers and across machines that share a disk, hence the random part.
    return path.with_name(f".{path.name}.{why}-{os.getpid()}-{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Remove a file or folder as far as possible: leftovers of a folder are no reason to end a run."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def visible(folder: Path) -> list[Path]:
    """Return what is in a folder except hidden names, which are drafts, locks, and what killed processes left."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def is_inside(name: str) -> bool:
    """Return whether a relative name, such as one in a manifest that someone else wrote, stays below its folder."""
    # Backslashes and drive letters too: what is written here may be read on Windows.
    parts = name.replace("\\", "/").split("/")
    return not ({"", ".", ".."} & set(parts) or ":" in parts[0] or "\0" in name)


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether a path, followed through every link, is outside a folder that it was found in.

    The Hub's download cache holds links from a snapshot to the blobs of the same repository; those stay inside.
    """
    real, root = path.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return False
    snapshot = next((place for place in (root, *root.parents) if place.parent.name == "snapshots"), None)
    return snapshot is None or not real.is_relative_to(snapshot.parent.parent / "blobs")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; do nothing on a file system without fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, synced: bool = False) -> None:
    """Write a file of UTF-8 whole or not at all; ``synced`` as in `whole_file`.

    Raises:
        OSError: If it cannot be written; then nothing is left of it.
    """
    with whole_file(path, synced=synced) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(
    path: Path,
    content: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    sort_keys: bool = False,
    synced: bool = False,
) -> None:
    """Write a JSON file whole or not at all; ``synced`` as in `whole_file`.

    Raises:
        OSError: If it cannot be written.
        ValueError: If a number is NaN or infinite; `finite` replaces those.
    """
    # Python would write NaN and Infinity as bare words, which other JSON parsers refuse.
    write_text(path, json.dumps(content, indent=2, allow_nan=False, sort_keys=sort_keys) + "\n", synced=synced)


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace numbers that JSON cannot express (NaN, infinity) with None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


# ---- What killed processes left ----
#
# A process holds a lock on the folder it is filling, which ends with it however it ends: a hidden folder that nobody
# holds has no owner any more.

LEFT_FOR_DEAD = 24 * 60 * 60  # seconds, on file systems without locks
_MOMENT = 60  # seconds that a folder moved aside may wait for the one that takes its place
_NOT_HELD_YET = ".new"


@contextmanager
def new_held(folder: Path) -> Generator[None, None, None]:
    """Make a folder and hold it for the length of a block, so that `sweep` leaves it alone; it may be renamed."""
    # Under another name until it is held: a sweep in between would take it for a dead one.
    made = folder.with_name(folder.name + _NOT_HELD_YET)
    made.mkdir()
    descriptor = _open_to_lock(made)
    try:
        try:
            os.rename(made, folder)
        except OSError:
            made.rmdir()
            raise
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)  # and with it the lock, unless a forked child still has it


def sweep(folders: Iterable[Path]) -> None:
    """Remove folders that no process holds; those that cannot be looked at stay."""
    for folder in folders:
        with suppress(OSError):
            if not folder.is_dir() or folder.is_symlink():
                continue
            age = time.time() - folder.stat().st_mtime
            descriptor = _open_to_lock(folder)
            try:
                # None: held, or a file system without locks, where only the age tells.
                needed = LEFT_FOR_DEAD if descriptor is None else _MOMENT if folder.suffix == _NOT_HELD_YET else 0
                if age >= needed:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                if descriptor is not None:
                    os.close(descriptor)


def sweep_beside(path: Path) -> None:
    """Remove the hidden folders that killed processes left of ``path``; put back what was moved aside for it."""
    hidden = re.compile(rf"\.{re.escape(path.name)}\.(partial|replaced)-[0-9]+-[0-9a-f]{{8}}(\{_NOT_HELD_YET})?")
    with suppress(OSError):  # a folder that is missing or closed to us holds nothing to sweep
        for entry in list(path.parent.iterdir()):
            found = hidden.fullmatch(entry.name)
            if not found:
                continue
            # Moved aside for a new one that never came. A process that is just doing so gets its moment.
            if found[1] == "replaced" and time.time() - entry.stat().st_ctime > _MOMENT:
                if os.path.lexists(path):
                    remove(entry)
                else:
                    entry.rename(path)
            elif found[1] == "partial":
                sweep([entry])


def _open_to_lock(folder: Path) -> int | None:
    """Return a descriptor that holds a folder's lock; None if another process has it, or there are no locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


# ---- Reading ----


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not UTF-8 or not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[Any]:
    """Return the values of a file of JSON lines.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not UTF-8, or a line is not JSON.
    """
    # splitlines() also splits at U+2028 and the like, which json.dumps escapes unless told not to.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_record(path: Path, remedy: str = "") -> dict[str, Any]:
    """Return a record's content.

    Args:
        path: A file of JSON if its name ends in ``.json``, otherwise of YAML.
        remedy: What to do about a damaged one, a sentence.

    Raises:
        UserInputError: If it is missing, cannot be read, or holds no mapping.
    """
    remedy = f" {remedy}" if remedy else ""
    try:
        content = read_json(path) if path.suffix == ".json" else read_yaml(path.read_text(encoding="utf-8"))
    # RecursionError: nested deeper than a parser can go.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserInputError(f"{path}: cannot be read ({error}).{remedy}") from error
    if not isinstance(content, dict):
        raise UserInputError(f"{path}: must hold a mapping, got {type(content).__name__}.{remedy}")
    return content


def read_yaml(text: str, nodes: int = MAX_NODES) -> Any:
    """Return what YAML says, of others as well.

    Args:
        text: YAML.
        nodes: Values it may stand for.

    Raises:
        yaml.YAMLError: If it is none, or larger than `yaml_budget` allows.
    """
    check_budget(text, nodes)
    return yaml.safe_load(text)


def read_record_if_there(path: Path, remedy: str = "") -> dict[str, Any] | None:
    """Return a record's content as `read_record` does, None for a missing file."""
    return read_record(path, remedy) if path.exists() else None


# ---- Records that know whether they are whole ----

SEAL = "record_sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the SHA-256 of its content, by which a flipped bit in it is found."""
    return {**content, SEAL: _seal(content)}


def is_whole(content: Mapping[str, Any]) -> bool:
    """Tell whether a record is as `sealed` gave it; one without a seal, of an earlier version, passes."""
    return SEAL not in content or content[SEAL] == _seal(content)


def _seal(content: Mapping[str, Any]) -> str:
    # As JSON gives it back: tuples are lists there.
    return sha256_of_text(json.dumps({k: v for k, v in content.items() if k != SEAL}, sort_keys=True))


# ---- Hashes ----


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as hex. The file is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 as hex."""
    return hashlib.sha256(text.encode()).hexdigest()
