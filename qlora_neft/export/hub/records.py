"""Records of a training, gathered from a run's files; for a checkpoint, up to its step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapter.folder import AdapterFolder
from ...errors import UserInputError
from ...files import read_json_lines, read_record, read_record_if_there
from ...recipe import Recipe
from ...recipe.schema import Neftune
from ...run_folder.record import RUN_FILE, DataSource, Rows, RunData, RunFile, RunSummary
from .public import TEMPLATE_FILE, PublicBase, is_hub_id, is_template_file, public_path, without_local_paths

SUMMARY_VERSION = 1
NOISE_RULE = "alpha / sqrt(L * d) times noise, L: each sequence's own number of tokens, d: embedding width"
# Keys of the log, and the names under which their means are published.
MEANS = {
    "neftune_norm": "measured_norm",
    "neftune_expected_norm": "expected_norm",
    "neftune_noise_to_embedding": "noise_to_embedding",
}
# Only what is listed here is published of the data: a key that a later version adds stays private until it is looked
# at.
COUNTS = (
    "rows",
    "tokens",
    "trained_tokens",
    "truncated",
    "dropped",
    "duplicates",
    "lengths",
    "sha256",
    "tokens_sha256",
)
SOURCE_KEYS = ("path", "rows", "format", "prompt_template", "weight", "end")


@dataclass(frozen=True)
class Records:
    """Everything on record about a training.

    Attributes:
        facts: The run's summary; for a checkpoint, what it and its run say under the same names.
        log: Log entries with ``step``, oldest first.
        step: The optimizer step of a checkpoint, None for a finished run.
    """

    facts: RunSummary
    log: list[dict[str, Any]]
    step: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is on record."""
        return not self.facts.model_fields_set

    def measured_noise(self) -> dict[str, float]:
        """Return the measurements of the noise, averaged over the logged steps."""
        found = {}
        for key, name in MEANS.items():
            values = [entry[key] for entry in self.log if entry.get(key) is not None]
            if values:
                found[name] = sum(values) / len(values)
        return found


def read_records(folder: AdapterFolder) -> Records:
    """Read the records beside an adapter; empty if another program trained it.

    Raises:
        UserInputError: If one of them cannot be read.
    """
    state = folder.path / "trainer_state.json"
    # A run writes its summary at the end: a folder with the trainer's state alone is a checkpoint.
    if folder.summary is None and state.is_file():
        return _of_checkpoint(folder, read_record(state))
    # Lenient: another program's summary, or an older one's, gives what it has.
    return Records(RunSummary.of(folder.summary), _log(folder.path / "metrics.jsonl"))


def _of_checkpoint(folder: AdapterFolder, state: Mapping[str, Any]) -> Records:
    log, step = state.get("log_history", []), state.get("global_step")
    progress = read_record_if_there(folder.path / "progress.json") or {}
    # A checkpoint lies in its run's folder, which holds what does not change from one to the next.
    run = RunFile.of(read_record_if_there(folder.path.parent / RUN_FILE))
    facts = RunSummary.of(
        {
            "steps": step,
            "base_sha256": run.base_sha256,
            "adapter_sha256": run.adapter_sha256,
            **{key: progress.get(key) for key in ("tokens_seen", "trained_tokens_seen", "bad_steps", "train_seconds")},
            "before": {
                "clean_train_loss": run.before.clean_train_loss if run.before else None,
                "held_out_loss": run.before.held_out_loss if run.before else None,
            },
            "latest": {
                name: {"step": entry["step"], "value": entry[key]}
                for key, name in (("clean_loss", "clean_train_loss"), ("eval_loss", "held_out_loss"))
                # The newest entry that has it: neither is measured at every logged step.
                if (entry := next((entry for entry in reversed(log) if entry.get(key) is not None), None))
            },
            "data": read_record_if_there(folder.path.parent / "data_report.json"),
        }
    )
    return Records(facts, log, step)


def _log(path: Path) -> list[dict[str, Any]]:
    try:
        return read_json_lines(path) if path.is_file() else []
    except (OSError, ValueError) as error:
        raise UserInputError(f"{path}: cannot be read ({error}).") from error


# ---- What is published of them: training_summary.json ----


@dataclass(frozen=True)
class Training:
    """All that is known of a published adapter.

    Attributes:
        base: Its base on the Hub.
        recipe: As it was run, with this machine's paths; None if another program trained it.
        records: Of the run.
        dtype: Dtype of the published weights.
        trained_dtype: Dtype of the trained weights.
    """

    base: PublicBase
    recipe: Recipe | None
    records: Records
    dtype: str
    trained_dtype: str

    @property
    def noise(self) -> Neftune | None:
        """The noise; None if there was none, or nothing is known of the training."""
        noise = self.recipe.neftune if self.recipe else None
        return noise if noise and (noise.noise_alpha or noise.final_alpha) else None

    def summary(self) -> dict[str, Any]:
        """Return the content of ``training_summary.json`` without ``files``. What is not on record is omitted."""
        facts, recipe = self.records.facts, self.recipe
        values: dict[str, Any] = {
            "summary_version": SUMMARY_VERSION,
            # None is omitted below: of another program's training nothing is claimed.
            "status": "done" if self.records.step is None and not self.records.is_empty else None,
            "checkpoint_step": self.records.step,
            "base": {"id": self.base.id, "revision": self.base.commit},
            "adapter": {"dtype": self.dtype, "trained_dtype": self.trained_dtype},
            "quantization": recipe
            and recipe.quantization
            and recipe.quantization.model_dump(mode="json", warnings=False),
            "neftune": self._noise_summary(),
            "data": facts.data and self._data_summary(facts.data),
            "seed": facts.seed,
            "steps": facts.steps,
            "selection": facts.selection and facts.selection.model_dump(exclude_none=True),
            "tokens_seen": facts.tokens_seen,
            "trained_tokens_seen": facts.trained_tokens_seen,
            "bad_steps": facts.bad_steps,
            "parameters": facts.parameters,
            "lora_parameters": facts.lora_parameters,
            "census": facts.census and facts.census.model_dump(exclude_unset=True),
            "base_sha256": facts.base_sha256,
            "adapter_sha256": facts.adapter_sha256,
            "base_unchanged": facts.base_unchanged,
            "train_seconds": facts.train_seconds,
            "before": facts.before,
            "after": facts.after,
            "latest": facts.latest,
            "precision": facts.precision,
            # The system's version and number of threads are nobody's business.
            "hardware": facts.hardware and {"device": facts.hardware.device, "name": facts.hardware.name},
            "peak_memory": facts.peak_memory,
            "versions": facts.versions,
        }
        # 0 and False stay: they are measurements.
        return {key: value for key, value in values.items() if value not in (None, {}, [])}

    def _noise_summary(self) -> dict[str, Any] | None:
        if self.recipe is None:
            return None
        if self.noise is None:
            return {"noise_alpha": 0.0}
        stated = self.noise.model_dump(mode="json", warnings=False)
        return {**stated, "rule": NOISE_RULE, **self.records.measured_noise()}

    def _data_summary(self, data: RunData) -> dict[str, Any]:
        parts = {"train": data.train, "eval": data.eval}
        return {
            **{name: _counts(rows) for name, rows in parts.items() if rows},
            "sources": [_source(source) for source in data.sources],
            "warnings": [without_local_paths(warning, self.recipe) for warning in data.warnings],
        }


def _counts(rows: Rows) -> dict[str, Any]:
    # What the record lacks is omitted, not published as a default.
    stated = rows.model_dump(exclude_unset=True)
    return {key: stated[key] for key in COUNTS if key in stated}


def _source(source: DataSource) -> dict[str, Any]:
    stated = source.model_dump(exclude_unset=True)
    kept = {key: stated[key] for key in SOURCE_KEYS if key in stated}
    if is_template_file(source.prompt_template):
        kept["prompt_template"] = TEMPLATE_FILE
    return {**kept, "path": public_path(source.path), "on_hub": is_hub_id(source.path)}
