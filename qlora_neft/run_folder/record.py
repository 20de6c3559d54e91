"""The records of a run, typed for every reader: ``run.json``, ``summary.json``, ``answers.json``, ``measures.json``.

There are two ways to read one:

- `Record.read` reads a file, None if it is missing, and refuses a damaged one by name.
- `Record.of` takes plain values and drops what has another type: the record of an adapter may have been written by an
  older or newer version, or by another program.

No torch, which reports and exports read records without.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import UserInputError
from ..files import read_record_if_there, write_json

RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
ANSWERS_FILE = "answers.json"
TRACKERS_FILE = "trackers.json"  # what a resume needs to go on with the same tracked runs
MEASURES_FILE = "measures.json"
MADE = "made"  # in a measure: how its numbers were made; measures of earlier versions lack it
RECIPE_FILE = "recipe.yaml"


class Record(BaseModel):
    """A record, or a part of one. Unknown keys, of another version, are dropped; missing keys have a default."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    @classmethod
    def read(cls, path: Path, remedy: str) -> Self | None:
        """Read a record's file.

        Args:
            path: The file.
            remedy: What to do about a damaged file, a sentence.

        Returns:
            The record, None if there is no such file.

        Raises:
            UserInputError: If the file is damaged: it cannot be read, or has another shape.
        """
        content = read_record_if_there(path, remedy)
        return None if content is None else cls.checked(content, path, remedy)

    @classmethod
    def checked(cls, content: Mapping[str, Any], path: Path, remedy: str) -> Self:
        """Make a record from a file's content.

        Raises:
            UserInputError: If it has another shape; the message names the path, the first wrong place and the remedy.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            # The first is enough: a damaged file is made anew or removed, not repaired.
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserInputError(f"{path}: is damaged at {place} ({first['msg']}). {remedy}") from error

    @classmethod
    def of(cls, content: Mapping[str, Any] | None) -> Self:
        """Make a record from what can be used of its content.

        Values of another type are dropped; so is a mapping that lacks a required key.
        """
        values = copy.deepcopy(dict(content or {}))  # values are removed below, and these are the caller's
        while True:
            try:
                return cls.model_validate(values)
            except ValidationError as error:
                first = error.errors()[0]  # one at a time, since removing one value may settle other errors too
                # A missing key cannot be removed; the mapping that lacks it can.
                place = first["loc"][:-1] if first["type"] == "missing" else first["loc"]
                if not _remove(values, list(place)):
                    return cls.model_construct()


def _remove(values: Any, place: list[int | str]) -> bool:
    """Remove the value at a place, and return whether there was one."""
    while place:
        owner = values
        try:
            for part in place[:-1]:
                owner = owner[part]
            del owner[place[-1]]
        except (KeyError, IndexError, TypeError):
            place.pop()  # pydantic ends the place of a union's member with the name of a type
        else:
            return True
    return False


class SampleAnswer(Record):
    """An answer to a held-out prompt."""

    prompt: str
    reference: str
    text: str


class Before(Record):
    """Measurements before training: losses in nats per trained token, None for NaN or without held-out rows."""

    clean_train_loss: float | None = None
    held_out_loss: float | None = None
    answers: list[SampleAnswer] | None = None


class RunIdentity(Record):
    """What decides what a run trains on, beside the weights; a path is no part of it.

    Attributes:
        tokens: SHA-256 of the training sequences: their ids, and how much each token counts in the loss.
        rows: SHA-256 of what the training rows say.
        held_out: SHA-256 of the held-out sequences where they decide which weights are the result, else None.
        templates: SHA-256 of the chat templates they were rendered by: ``chat`` is the tokenizer's own, ``file`` the
            recipe's.
        tokenizer: SHA-256 of each part of the tokenizer.
        special_tokens: Named special tokens.
        now: The moment whose date the templates wrote, ISO 8601; None if none of them reads it.
        versions: Versions of what turned rows into tokens.
        base_config: The base's ``config.json``.
    """

    tokens: str | None = None
    rows: str | None = None
    held_out: str | None = None
    templates: dict[str, str] = {}
    tokenizer: dict[str, str] = {}
    special_tokens: dict[str, str] = {}
    now: str | None = None
    versions: dict[str, str] = {}
    base_config: dict[str, Any] = {}


class RunFile(Record):
    """The content of ``run.json``: what a run is, written before it trains. Its checkpoints' manifests say the same.

    Attributes:
        recipe: `Recipe.to_dict` as it was written; None in a damaged record.
        data_sha256: Hash of what the training rows say and of the chat template.
        base_sha256: Hash of the frozen base's NF4 bytes.
        adapter_sha256: Hash of the adapter's file that it goes on from, None if it began anew.
        before: Measurements before the first step.
        measured_on: What they were made on: the hash of the held-out rows, and how many answers were asked for.
        identity: What a resume must find as it was; None in the record of an earlier version.
        record_sha256: Hash of the record itself, see `files.sealed`.
    """

    recipe: dict[str, Any] | None = None
    data_sha256: str | None = None
    base_sha256: str | None = None
    adapter_sha256: str | None = None
    before: Before | None = None
    measured_on: dict[str, Any] | None = None
    identity: RunIdentity | None = None
    record_sha256: str | None = None


# Without the first three keys it is no such record; a published one has only some of the others.
class Rows(Record):
    """One part of the data in numbers, as in ``data_report.json``."""

    rows: int
    tokens: int
    sha256: str
    tokens_sha256: str | None = None
    source_rows: int | None = None
    trained_tokens: int | None = None
    share_trained: float | None = None
    truncated: int | None = None
    truncated_fraction: float | None = None
    dropped: int | None = None
    empty: int | None = None
    unfit: int | None = None
    without_room: int | None = None
    only_end: int | None = None
    texts_split: int | None = None
    chunks: int | None = None
    duplicates: int | None = None
    ended: int | None = None
    lengths: dict[str, int | float | None] | None = None
    histogram: dict[str, list[int]] | None = None


class DataSource(Record):
    """A source of rows, and how they were read; ``end`` is the token that ends a response."""

    path: str
    rows: int | None = None
    format: str | None = None
    prompt_template: str | None = None
    weight: float | None = None
    end: str | None = None
    end_of_call: str | None = None
    lacks_begin: str | None = None
    columns_not_used: list[str] = []
    keys_not_used: list[str] = []
    shape: str | None = None


class RunData(Record):
    """The data that a run trained on and was measured on."""

    train: Rows | None = None
    eval: Rows | None = None
    sources: list[DataSource] = []
    warnings: list[str] = []


class Hardware(Record):
    """The machine of a run; a published record has only device and name."""

    device: str
    name: str
    threads: int | None = None
    platform: str | None = None


class MemoryUse(Record):
    """The planner's estimate and the measured peak, in bytes."""

    estimated_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    terms: dict[str, Any] | None = None


class LossOfOneRow(Record):
    """The loss of one row before the first step, nats per token, and the head that is trained through.

    ``head`` is ``fused`` where TRL's fused head gives the loss of the model's own logits, else ``plain``.
    """

    head: str
    model_loss: float | None = None
    fused_loss: float | None = None


class KeptWeights(Record):
    """Weights of the blocks that are not in NF4, as `qlora_neft.base.census` counts them."""

    names: str
    weights: int
    why: str


class ModelCensus(Record):
    """What was counted on the loaded model: see `qlora_neft.base.census.Census`.

    Attributes:
        nf4_share: Share of the block weights in NF4.
        reached_share: Share of the trained weights that can receive a gradient.
    """

    nf4_share: float | None = None
    block_weights: int | None = None
    nf4_weights: int | None = None
    kept: list[KeptWeights] = []
    linear_layers: int | None = None
    adapted_layers: int | None = None
    without_lora: list[str] = []
    routers: list[str] = []
    trained: int | None = None
    reached: int | None = None
    reached_share: float | None = None

    def lines(self) -> list[str]:
        """Return what was counted, a line for each kind of count; without what is not on record."""
        found = []
        if any(entry.why == "not quantized" for entry in self.kept):
            found.append("not quantized")
        elif self.nf4_share is not None:
            kept = [entry for entry in self.kept if entry.why != "norms and biases"][:3]
            apart = ", ".join(f"{entry.names} ({entry.why})" for entry in kept)
            found.append(
                f"{_percent(self.nf4_share)} of the block weights in NF4" + f"; in 16 bits: {apart}" * bool(apart)
            )
        if self.linear_layers is not None and self.adapted_layers is not None:
            left = f"; none on {', '.join(self.without_lora[:3])}" if self.without_lora else ""
            routers = "; routers not trained" if self.routers else ""
            found.append(f"LoRA on {self.adapted_layers} of {self.linear_layers} linear layers{left}{routers}")
        if self.reached_share is not None:
            found.append(f"{_percent(self.reached_share)} of the trained weights receive a gradient")
        return found


def _percent(share: float) -> str:
    # Only all of it is 100%.
    return "99.9%" if share < 1 and f"{share:.1%}" == "100.0%" else f"{share:.1%}"


class Selection(Record):
    """Which step's weights a run ended with, as `qlora_neft.trainer.selection.Selected` has it."""

    keep: str | None = None
    step: int | None = None
    held_out_loss: float | None = None
    best_step: int | None = None
    best_held_out_loss: float | None = None
    stopped_early: bool | None = None
    planned_steps: int | None = None
    without_improvement: int | None = None


class RunSummary(Record):
    """The content of ``summary.json``: what a run was and what it led to.

    A dry run has the keys up to ``base_commit``, which are known before any weight is loaded. The
    ``training_summary.json`` of a published adapter has some of the keys.

    Attributes:
        status: ``done`` or ``dry run``.
        recipe: `Recipe.to_dict` as it was written.
        precision: The arithmetic in words.
        plan: The resolved machine settings.
        fast_path: Which pieces of the fast path were on, and for how many layers one was not, by reason.
        resumed_from_step: Where the last session began, None for step 0.
        selection: Which step's weights are the result; None where the recipe leaves that to the last step.
        parameters, lora_parameters: Counts of the loaded model.
        census: What of it is in NF4, has LoRA, and can be trained.
        before, after: Measures by name, such as ``held_out_loss``.
        latest: The last logged measures of a published checkpoint, each with its ``step`` and ``value``.
        peak_memory: Bytes by kind of memory.
        identity: What decided what it trained on.
        files: SHA-256 of every file of the result.
        record_sha256: Hash of the record itself, see `files.sealed`.
    """

    summary_version: int | None = None
    status: str | None = None
    recipe: dict[str, Any] | None = None
    seed: int | None = None
    precision: str | None = None
    plan: dict[str, Any] | None = None
    data: RunData | None = None
    versions: dict[str, str] | None = None
    hardware: Hardware | None = None
    base_commit: str | None = None
    steps: int | None = None
    tokens_seen: int | None = None
    trained_tokens_seen: int | None = None
    bad_steps: int | None = None
    fast_path: dict[str, Any] | None = None
    decisions: list[str] = []
    resumed_from_step: int | None = None
    selection: Selection | None = None
    parameters: int | None = None
    lora_parameters: int | None = None
    census: ModelCensus | None = None
    base_sha256: str | None = None
    adapter_sha256: str | None = None
    base_unchanged: bool | None = None
    loss_check: LossOfOneRow | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    latest: dict[str, Any] | None = None
    train_seconds: float | None = None
    wall_seconds: float | None = None
    peak_memory: dict[str, int | float | None] | None = None
    memory: MemoryUse | None = None
    identity: RunIdentity | None = None
    files: dict[str, str] = {}
    record_sha256: str | None = None


class Answers(Record):
    """The content of ``answers.json``: sample answers after training."""

    answers: list[SampleAnswer] = []


class Measures(Record):
    """The content of ``measures.json``: measurements of a finished run, under each measure's name numbers by name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]]  # ty: ignore[incompatible-mutable-override]  narrower, as pydantic documents

    @property
    def by_name(self) -> dict[str, dict[str, Any]]:
        """All measures, by name."""
        return dict(self.__pydantic_extra__)


# ---- Writing ----


def keep_measures(
    folder: str | Path, name: str, numbers: Mapping[str, Any], made: Mapping[str, Any] | None = None
) -> None:
    """Store numbers under a measure's name in a run's folder, in place of earlier ones.

    Args:
        folder: What the user named. Nothing is stored for a Hub id or another program's adapter.
        name: The measure's name.
        numbers: Numbers by name; those that are not finite are dropped.
        made: How they were made, stored beside them: numbers made in two ways are never compared. For a measure whose
            numbers were made each in its own way, a mapping by number.

    Raises:
        UserInputError: If the existing file is damaged.
    """
    folder = Path(folder).expanduser()
    if not (folder / RECIPE_FILE).is_file():
        return
    # JSON has no NaN: a number that could not be measured is absent.
    found = {key: value for key, value in numbers.items() if _is_number(value)}
    stored = read_record_if_there(folder / MEASURES_FILE, "Remove it to measure again.") or {}
    write_json(folder / MEASURES_FILE, {**stored, name: found | ({MADE: dict(made)} if made is not None else {})})


def _is_number(value: object) -> bool:
    # bool is an int to Python.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
