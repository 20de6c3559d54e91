"""How long a run takes, from the size of its data and a range of speeds."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

BYTES_PER_TOKEN = (2.5, 5.0)  # of a data file, names of columns and quotes included; text and tokenizers differ


def local_bytes(path: str) -> int | None:
    """Bytes of a local data file, or of all a pattern matches; None for data on the Hub."""
    expanded = str(Path(path).expanduser())
    files = [Path(name) for name in (glob.glob(expanded) or [expanded])]
    if not all(file.is_file() for file in files):
        return None
    return sum(file.stat().st_size for file in files)


def tokens_in(num_bytes: int) -> tuple[float, float]:
    """Fewest and most tokens that so much data is likely to be."""
    fine, coarse = BYTES_PER_TOKEN
    return num_bytes / coarse, num_bytes / fine


def seconds(tokens: tuple[float, float], speed: Sequence[float] | None) -> list[int] | None:
    """Shortest and longest time for so many tokens; None where the speed is not known."""
    if speed is None:
        return None
    low, high = speed
    return [round(tokens[0] / high), round(tokens[1] / low)]
