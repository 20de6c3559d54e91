"""Text files, written whole or not at all."""

from __future__ import annotations

from pathlib import Path


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
