"""Results as files, one each, written whole or not at all. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def part_path(state: Path, key: str) -> Path:
    """Return where a result is."""
    return state / "parts" / f"{key}.json"


def write_part(state: Path, key: str, result: dict[str, Any]) -> None:
    """Write a result."""
    write_whole(part_path(state, key), json.dumps(result, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is whole whenever it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def read_parts(state: Path) -> dict[str, dict[str, Any]]:
    """Return all results, by name."""
    found = sorted((state / "parts").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in found}
