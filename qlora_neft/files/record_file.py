"""Records that a run or an adapter left, JSON or YAML, read with a message where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserInputError


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
