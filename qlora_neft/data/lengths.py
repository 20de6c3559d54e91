"""How long sequences are: percentiles, a histogram, and what padding them costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from ..steps.batch import split_rows

PERCENTILES = (5, 25, 50, 75, 95, 99)
MAX_BINS = 24
BIN_WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
WASTE_STEPS = 200  # steps over which padding is counted


def sequence_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of each sequence, int64 (N,), without reading the tokens."""
    return np.asarray(pc.list_value_length(dataset.data.column("input_ids")), dtype=np.int64)


def histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Counts of lengths in bins of one width, a power of two: ``edges`` (one more than bins), ``counts``."""
    if not len(lengths):
        return {"edges": [], "counts": []}
    longest = int(lengths.max())
    width = next((w for w in BIN_WIDTHS if longest // w < MAX_BINS), BIN_WIDTHS[-1])
    counts = np.bincount(lengths // width)
    return {"edges": [width * i for i in range(len(counts) + 1)], "counts": counts.tolist()}


def padding_waste(
    lengths: np.ndarray, batch_size: int, max_rows: int, max_tokens: int | None, *, padding_free: bool, seed: int = 0
) -> dict[str, float]:
    """Share of computed positions that are padding, over some shuffled optimizer steps.

    Args:
        lengths: Tokens of each sequence.
        batch_size: Sequences per optimizer step.
        max_rows, max_tokens: Of a micro-batch, as the trainer splits the step.
        padding_free: Whether the trainer pads at all.
        seed: Of the order.

    Returns:
        ``random_batches``, each step padded to its longest sequence; ``as_run``, split as the trainer splits it.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))[: WASTE_STEPS * batch_size]
    steps = [lengths[order[start : start + batch_size]].tolist() for start in range(0, len(order), batch_size)]
    real = sum(map(sum, steps))
    naive = sum(len(step) * max(step) for step in steps)
    split = sum(_computed(step, max_rows, max_tokens) for step in steps)
    waste = {"random_batches": naive, "as_run": real if padding_free else split}
    return {name: round(1 - real / positions, 4) if positions else 0.0 for name, positions in waste.items()}


def _computed(step: Sequence[int], max_rows: int, max_tokens: int | None) -> int:
    parts = split_rows(step, max_rows, max_tokens)
    return sum(len(part) * max(step[i] for i in part) for part in parts)


def percentiles(lengths: np.ndarray) -> dict[str, float | int | None]:
    """``min``, ``p5``, ..., ``max`` and ``mean`` of lengths, in tokens; None each without any."""
    names = [f"p{percent}" for percent in PERCENTILES]
    if not len(lengths):
        return dict.fromkeys(("min", *names, "max", "mean"))
    # "higher": a percentile is a length that occurs.
    values = [int(value) for value in np.percentile(lengths, PERCENTILES, method="higher")]
    found = dict(zip(names, values, strict=True))
    return {"min": int(lengths.min()), **found, "max": int(lengths.max()), "mean": round(float(lengths.mean()), 1)}
