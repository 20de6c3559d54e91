"""Losses of single held-out rows, where a run's folder has them, and what they say about the choice of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..files.record_file import read_record_if_there
from .arms import Arm
from .statistics import CONFIDENCE, Interval, ratio_bootstrap_interval

ROWS_FILE = "row_losses.json"


def read_rows(folder: Path) -> dict[str, Any] | None:
    """``sums`` (nats), ``counts`` (trained tokens) by held-out row, and ``rows``, their hash; None without them.

    Raises:
        UserInputError: If the file is damaged.
    """
    return read_record_if_there(folder / ROWS_FILE, "Remove it to measure again.")


def rows_interval(arm: Arm, other: Arm, confidence: float = CONFIDENCE) -> Interval | None:
    """Bootstrap over held-out rows of the difference of held-out losses, ``arm`` minus ``other``.

    It says how far other rows of the same kind could move the difference between *these* trained models. It knows
    nothing of how other seeds would have trained them.

    Returns:
        None where the runs have no losses by row, or of other rows.
    """
    its = {run.seed: run for run in other.runs}
    pairs = [(read_rows(run.folder), read_rows(its[run.seed].folder)) for run in arm.runs if run.seed in its]
    if not pairs or any(a is None or b is None or a["rows"] != b["rows"] for a, b in pairs):
        return None
    if len({a["rows"] for a, _ in pairs}) > 1 or len(pairs[0][0]["counts"]) < 2:
        return None
    sums = np.mean([np.subtract(a["sums"], b["sums"]) for a, b in pairs], axis=0)  # (N,)
    return ratio_bootstrap_interval(sums, np.asarray(pairs[0][0]["counts"]), confidence)
