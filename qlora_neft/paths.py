"""Decide what a name stands for: a file of this package, something local, or a repository on the Hub. Only here."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from .errors import UserInputError

PathKind = Literal["bundled", "local", "hub"]

PREFIX = "bundled:"
# Files of rows. Those of text may be compressed: ``rows.jsonl.gz``.
TEXT_KINDS, TABLE_KINDS = (".json", ".jsonl", ".csv"), (".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DATA_SUFFIXES = (*TEXT_KINDS, *TABLE_KINDS, *(kind + packed for kind in TEXT_KINDS for packed in COMPRESSIONS))
JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")

# What the Hub's own check of a repository id lets through: "name" or "owner/name".
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_PACKAGE = Path(__file__).resolve().parent


def kind_of(path: str, *, suffixes: tuple[str, ...] = ()) -> PathKind:
    """Decide whether a name is that of a bundled file, of something local, or of a repository on the Hub.

    What does not have the form of a Hub id is local, whether it exists or not: ``./x``, ``~/x``, ``a/b/c``, ``C:\\x``,
    a glob pattern. Of the others, what exists is local, as it is for transformers and datasets.

    Args:
        path: A name, as a user writes it.
        suffixes: Endings, in lower case, that a local file has: ``rows.jsonl`` is no repository.
    """
    if path.startswith(PREFIX):
        return "bundled"
    # By default there are no suffixes, and endswith(()) is False.
    if not _HUB_ID.fullmatch(path) or path.lower().endswith(suffixes) or os.path.exists(path):
        return "local"
    return "hub"


def data_kind(path: str | os.PathLike[str]) -> str | None:
    """Return what a file of rows holds by its name, whether it is compressed or not: ``.jsonl`` for ``a.jsonl.gz``.

    None for a file of another kind.
    """
    name = os.fspath(path).lower()
    suffix = next((suffix for suffix in sorted(DATA_SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), None)
    return None if suffix is None else next(kind for kind in (*TEXT_KINDS, *TABLE_KINDS) if _is_kind(suffix, kind))


def _is_kind(suffix: str, kind: str) -> bool:
    return suffix == kind or suffix in {kind + packed for packed in COMPRESSIONS}


def resolve_bundled(path: str) -> str:
    """Turn ``bundled:demo/base`` into the path of that file or folder inside the package, ``~/base`` into one at home.

    Any other path is returned unchanged, so that callers need no case of their own.

    Raises:
        UserInputError: If the package holds nothing of that name.
    """
    if not path.startswith(PREFIX):
        return os.path.expanduser(path)
    target = (_PACKAGE / path.removeprefix(PREFIX)).resolve()
    # Only the data folder: "bundled:../x" must not reach out of it, nor "bundled:run.py" into the code.
    if not target.is_relative_to(_PACKAGE / "demo") or not target.exists():
        known = ", ".join(PREFIX + name for name in _bundled_names())
        raise UserInputError(f"{path}: the package holds no such file. It holds: {known or 'nothing'}.")
    return str(target)


def shown_path(path: str) -> str:
    """Return a path as messages show it: one inside the package by its ``bundled:`` name."""
    # Otherwise messages and reports would name the place that the package is installed in.
    inside = Path(path)
    return f"{PREFIX}{inside.relative_to(_PACKAGE).as_posix()}" if inside.is_relative_to(_PACKAGE / "demo") else path


def _bundled_names() -> list[str]:
    return sorted(f"demo/{entry.name}" for entry in (_PACKAGE / "demo").glob("*"))
