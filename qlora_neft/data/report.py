"""The data report: what a run trains on, in numbers. Written as ``data_report.json`` and shown by ``preview``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from ..steps.batch import split_rows
from .gate import Limits, Tally, find_problems, find_warnings
from .worker import EMPTY, NO_ROOM, UNFIT, Settings

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


REPORT_VERSION = 1


def data_report(
    state: dict[str, Any],
    train: Dataset,
    held_out: Dataset | None,
    settings: Settings,
    limits: Limits,
    eval_fraction: float | None,
) -> dict[str, Any]:
    """The report of prepared data.

    Args:
        state: What the preparation found: ``train``, ``eval`` (tallies), their fingerprints, ``sources``, ``overlap``.
        train, held_out: The sequences.
        settings, limits: What they were prepared with, and what is allowed.
        eval_fraction: Share that was held out, None if the held-out rows have a source of their own.
    """
    tally = Tally.from_dict(state["train"])
    described = _part(train, tally, state["train_sha256"])
    key = _named("data.path", state["sources"])
    problems = find_problems(tally, limits, settings.max_length, key)
    warnings = find_warnings(tally, limits, key) + _warnings_on_ends(state)
    eval_described = None
    if held_out is not None:
        eval_tally = Tally.from_dict(state["eval"])
        eval_described = _part(held_out, eval_tally, state["eval_sha256"])
        if eval_fraction is None:
            eval_key = _named("data.eval_path", state["eval_sources"])
            problems += find_problems(eval_tally, limits, settings.max_length, eval_key)
            warnings += find_warnings(eval_tally, limits, eval_key)
        elif not problems and not (tally.sequences and eval_tally.sequences):
            problems.append(
                f"data.eval_fraction: {eval_fraction:g} of {tally.rows + eval_tally.rows} rows leaves no rows on one "
                "side. Give more rows or another fraction."
            )
        if state["overlap"]:
            warnings.append(
                f"data.eval_path: {state['overlap']:,} held-out rows are training rows as well; the held-out loss is "
                "too good by them."
            )
    counts = {name: described[name] for name in ("rows", "tokens", "trained_tokens", "truncated")}
    return {
        "report_version": REPORT_VERSION,
        **counts,
        "problems": problems,
        "warnings": warnings,
        "settings": asdict(settings) | asdict(limits),
        "sources": state["sources"],
        "train": described,
        "eval": eval_described,
    }


def _warnings_on_ends(state: dict[str, Any]) -> list[str]:
    other = sorted({d["end"] for d in state["sources"] if d["end"] not in (None, state["eos_token"])})
    return [
        f"data.prompt_template: responses end with {end}, and the tokenizer's end token is {state['eos_token']}: a "
        "program that stops at the latter alone will let the model run on."
        for end in other
    ]


def _named(key: str, described: Sequence[dict[str, Any]]) -> str:
    return f"{key}: {described[0]['path']!r}" if len(described) == 1 else key


def _part(dataset: Dataset, tally: Tally, sha256: str) -> dict[str, Any]:
    """Numbers of one part of the data.

    Args:
        dataset: Its sequences.
        tally: Its counts.
        sha256: Of what its rows say.
    """
    lengths = sequence_lengths(dataset)
    truncated = tally.finding("truncated").count
    return {
        "rows": tally.sequences,
        "source_rows": tally.rows,
        "tokens": tally.tokens,
        "trained_tokens": tally.trained_tokens,
        "share_trained": tally.trained_tokens / tally.tokens if tally.tokens else 0.0,
        "truncated": truncated,
        "truncated_fraction": truncated / tally.rows if tally.rows else 0.0,
        "dropped": tally.num_dropped(),
        "empty": tally.finding(EMPTY).count,
        "unfit": tally.finding(UNFIT).count,
        "without_room": tally.finding(NO_ROOM).count,
        "duplicates": tally.finding("duplicate").count,
        "ended": tally.ended,
        "lengths": percentiles(lengths),
        "histogram": histogram(lengths),
        "sha256": sha256,
    }
