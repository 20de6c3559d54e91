"""The data report: what a run trains on, in numbers. Written as ``data_report.json`` and shown by ``preview``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from datasets import Dataset

from .gate import Limits, find_problems, find_warnings
from .lengths import histogram, percentiles, sequence_lengths
from .tally import Tally
from .worker import EMPTY, NO_ROOM, UNFIT, Settings

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
