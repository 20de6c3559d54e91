"""Files that ship inside the package and are named ``bundled:...`` wherever a path is expected."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from .errors import UserInputError

PREFIX = "bundled:"
_PACKAGE = Path(__file__).resolve().parent


def resolve_bundled(path: str) -> str:
    """Turn ``bundled:demo/base`` into the path of that file or folder inside the package.

    Any other path is returned as it is, so that callers need no case of their own.

    Raises:
        UserInputError: If the package holds nothing of that name.
    """
    if not path.startswith(PREFIX):
        return path
    target = (_PACKAGE / path.removeprefix(PREFIX)).resolve()
    # Only the data folder: "bundled:../x" must not reach out of it, nor "bundled:run.py" into the code.
    if not target.is_relative_to(_PACKAGE / "demo") or not target.exists():
        known = ", ".join(PREFIX + name for name in _names())
        raise UserInputError(f"{path}: the package holds no such file. It holds: {known or 'nothing'}.")
    return str(target)


def shown_path(path: str) -> str:
    """A path as messages show it: one inside the package by its ``bundled:`` name."""
    inside = Path(path)
    return f"{PREFIX}{inside.relative_to(_PACKAGE).as_posix()}" if inside.is_relative_to(_PACKAGE / "demo") else path


def _names() -> list[str]:
    return sorted(f"demo/{entry.name}" for entry in (_PACKAGE / "demo").glob("*"))


DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")


def is_local(path: str) -> bool:
    """Whether a path names local files rather than a Hub id."""
    if path.lower().endswith(DATA_SUFFIXES) or path.startswith((".", "/", "~")) or os.path.exists(path):
        return True
    return glob.has_magic(path) and bool(_matches(path))


def _matches(pattern: str) -> list[str]:
    """What a pattern matches, less the folders on the way; a folder with the name of a file stays, to be refused."""
    found = set(glob.glob(pattern, recursive=True))
    return sorted(path for path in found if path.lower().endswith(DATA_SUFFIXES) or not os.path.isdir(path))
