"""Whether a folder is an export that nobody has touched since, and so may be made again."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserInputError
from ..files.file_hash import sha256_of_file

SUMMARY = "training_summary.json"
FILES_KEY = "files"  # in the summary: SHA-256 of every other file


def sha256_of_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an export but its summary, by name."""
    return {path.name: sha256_of_file(path) for path in sorted(folder.iterdir()) if path.name != SUMMARY}


def check_replaceable(output: Path) -> None:
    """Refuse a folder that holds anything but an export as it was written.

    Raises:
        UserInputError: With what would be lost.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserInputError(f"--output: {str(output)!r} is no folder. Give a new one.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    written = _written(output)
    if written is None:
        raise UserInputError(
            f"--output: {str(output)!r} is not empty and holds no export; nothing in it may be lost. Give a new folder."
        )
    there = {path.name: sha256_of_file(path) for path in output.iterdir() if path.is_file() and path.name != SUMMARY}
    folders = [path.name for path in output.iterdir() if path.is_dir()]
    changed = sorted({name for name, sha256 in there.items() if written.get(name) != sha256} | set(folders))
    if changed:
        raise UserInputError(
            f"--output: {str(output)!r} was changed since it was exported ({', '.join(changed)}), and the change would "
            "be lost. Remove the folder or give another. To publish it as it is: hf upload"
        )


def _written(output: Path) -> dict[str, str] | None:
    try:
        files = json.loads((output / SUMMARY).read_text(encoding="utf-8")).get(FILES_KEY)
    except (OSError, ValueError, AttributeError):
        return None
    return files if isinstance(files, dict) else None
