"""All that the files of a run say of an adapter, gathered; for a checkpoint, up to its step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from ..files.record_file import read_record
from ..trained import AdapterFolder

MEANS = {
    "neftune_norm": "measured_norm",
    "neftune_expected_norm": "expected_norm",
    "neftune_noise_to_embedding": "noise_to_embedding",
}


@dataclass(frozen=True)
class Records:
    """What is known of a training.

    Attributes:
        facts: ``summary.json``; of a checkpoint what it and its run's ``run.json`` say under the same names.
        log: Log entries with ``step``, oldest first.
        step: The optimizer step of a checkpoint, None for a finished run.
    """

    facts: dict[str, Any]
    log: list[dict[str, Any]]
    step: int | None = None

    def noise(self) -> dict[str, float]:
        """Means over the logged steps of what the noise measured."""
        found = {}
        for key, name in MEANS.items():
            values = [entry[key] for entry in self.log if entry.get(key) is not None]
            if values:
                found[name] = sum(values) / len(values)
        return found


def read_records(folder: AdapterFolder) -> Records:
    """Read the records beside an adapter; empty where another program trained it.

    Raises:
        UserInputError: If one of them cannot be read.
    """
    state = folder.path / "trainer_state.json"
    if folder.summary is None and state.is_file():
        return _of_checkpoint(folder, read_record(state))
    path = folder.path / "metrics.jsonl"
    return Records(folder.summary or {}, _read_lines(path) if path.is_file() else [])


def _of_checkpoint(folder: AdapterFolder, state: dict[str, Any]) -> Records:
    log, step = state.get("log_history", []), state.get("global_step")
    progress, run = (
        read_record(path) if path.is_file() else {}
        for path in (folder.path / "progress.json", folder.path.parent / "run.json")
    )
    facts: dict[str, Any] = {"steps": step, "recipe": folder.recipe, "base_sha256": run.get("base_sha256")}
    facts |= {key: progress.get(key) for key in ("tokens_seen", "trained_tokens_seen", "bad_steps", "train_seconds")}
    before = run.get("before") or {}
    facts["before"] = {key: before.get(key) for key in ("clean_train_loss", "held_out_loss")}
    facts["latest"] = {
        name: {"step": entry["step"], "value": entry[key]}
        for key, name in (("clean_loss", "clean_train_loss"), ("eval_loss", "held_out_loss"))
        for entry in [next((e for e in reversed(log) if e.get(key) is not None), None)]
        if entry
    }
    report = folder.path.parent / "data_report.json"
    if report.is_file():
        facts["data"] = read_record(report)
    return Records(facts, log, step)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserInputError(f"{path}: cannot be read ({error}).") from error
