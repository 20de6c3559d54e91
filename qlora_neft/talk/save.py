"""Conversations and answers as files: whole or not there, and never over what somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RunFailed, UserInputError
from ..files.text_file import write_text


class Saved:
    """Where a chat was saved; it may be saved there again."""

    def __init__(self) -> None:
        self._own: set[Path] = set()

    def write(self, name: str, rows: Mapping[str, list[dict[str, Any]]], *, main: str) -> str:
        """Write conversations as JSON, a row a line, which `data.path` takes; gives what was done.

        Args:
            name: Of the file; that of another side of a comparison gets the side's name behind it.
            rows: Of each side of the chat.
            main: The side that the file is named for.

        Raises:
            UserInputError: If there is nothing to save, or the file is there already or cannot be written.
        """
        if not name:
            raise UserInputError("/save: needs a file, as in /save talk.jsonl.")
        if not any(rows.values()):
            raise UserInputError("/save: nothing was said yet.")
        path = Path(name).expanduser()
        paths = {side: path if side == main else path.with_stem(f"{path.stem}-{side}") for side in rows}
        for target in paths.values():
            if target.exists() and target.resolve() not in self._own:
                raise UserInputError(f"/save: {str(target)!r} exists. Name a new file.")
        for side, target in paths.items():
            _write_whole(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[side]), "/save")
            self._own.add(target.resolve())
        return f"(saved: {', '.join(map(str, paths.values()))})"


def check_new(path: Path, key: str) -> None:
    """Refuse a file that is there, or whose folder is not, before any work is done for it.

    Raises:
        UserInputError: If so.
    """
    if path.exists():
        raise UserInputError(f"{key}: {str(path)!r} exists. Name a new file.")
    if not path.absolute().parent.is_dir():
        raise UserInputError(f"{key}: no folder at {str(path.parent)!r}. Make it first.")


def write_as_they_come(path: Path, lines: Iterable[str]) -> int:
    """Write lines to a hidden file beside ``path`` as they come, and give it its name at the end.

    Returns:
        How many.

    Raises:
        RunFailed: If they cannot be written; what there is so far stays in the hidden file.
    """
    draft, count = path.with_name(f".{path.name}.part"), 0
    try:
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for line in lines:
                file.write(line + "\n")
                file.flush()
                count += 1
        draft.replace(path)
    except OSError as error:
        begun = f" Begun: {str(draft)!r}." if draft.exists() else ""
        raise RunFailed(f"--output: {str(path)!r} cannot be written ({error.strerror}).{begun}") from error
    except KeyboardInterrupt:
        if count:
            raise RunFailed(f"interrupted after {count} prompts. Their answers: {str(draft)!r}.") from None
        draft.unlink(missing_ok=True)
        raise
    return count


def _write_whole(path: Path, text: str, key: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise UserInputError(f"{key}: {str(path)!r} cannot be written ({error.strerror}).") from error
