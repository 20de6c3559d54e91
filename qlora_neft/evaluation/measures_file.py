"""``measures.json`` in a run's folder: what was measured of it after training, for reports. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..files.json_file import write_json
from ..files.record_file import read_record_if_there

MEASURES_FILE, RECIPE = "measures.json", "recipe.yaml"


def keep_measures(folder: str | Path, name: str, numbers: dict[str, Any]) -> None:
    """Put numbers under a measure's name, in place of earlier ones; nothing is done for what is no run's folder.

    Args:
        folder: What the user named; a Hub id or another program's adapter has no such file.
        name: The measure.
        numbers: By name; what is no finite number is left out.

    Raises:
        UserInputError: If the file that is there is damaged.
    """
    folder = Path(folder).expanduser()
    if not (folder / RECIPE).is_file():
        return
    finite = {key: value for key, value in numbers.items() if _is_number(value)}
    stored = read_record_if_there(folder / MEASURES_FILE, "Remove it to measure again.") or {}
    write_json(folder / MEASURES_FILE, {**stored, name: finite})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
