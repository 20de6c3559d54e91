"""JSON files, written whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON has no word for (NaN, infinity) as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    draft = path.with_name(f".{path.name}.part")  # hidden: what a killed process leaves is not content
    try:
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
