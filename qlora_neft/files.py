"""Text files, written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from .errors import RunFailed, UserInputError


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 whole or not at all, replacing what has its name.

    Raises:
        OSError: If it cannot be written; then nothing is left of it.
    """
    draft = path.with_name(f".{path.name}.part")  # hidden: what a killed process leaves is not content
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON has no word for (NaN, infinity) as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_record(path: Path, remedy: str = "") -> dict[str, Any]:
    """A record's content.

    Args:
        path: A file of JSON if its name ends in ``.json``, else of YAML.
        remedy: What to do about a damaged one, a sentence.

    Raises:
        UserInputError: If it is missing, cannot be read, or holds no mapping.
    """
    remedy = f" {remedy}" if remedy else ""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserInputError(f"{path}: cannot be read ({error}).{remedy}") from error
    if not isinstance(content, dict):
        raise UserInputError(f"{path}: must hold a mapping, got {type(content).__name__}.{remedy}")
    return content


def read_record_if_there(path: Path, remedy: str = "") -> dict[str, Any] | None:
    """As `read_record`; None for a missing one."""
    return read_record(path, remedy) if path.exists() else None


def sha256_of_file(path: Path) -> str:
    """Of its bytes, in hexadecimal; read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
