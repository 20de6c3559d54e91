"""Files that ship inside the package and are named ``bundled:...`` wherever a path is expected."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserInputError

PREFIX = "bundled:"
_PACKAGE = Path(__file__).resolve().parents[1]


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
