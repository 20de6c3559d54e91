"""The parts of a run that need no weights: how the machine computes, the base's path, the data.

Nothing here imports PEFT, TRL or bitsandbytes, which a look at the data does not need; see `build_trainer`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..base.precision import PrecisionPolicy, resolve_precision
from ..data.prepare import PreparedData, Progress, prepare_data
from ..data.report import DataReport, padding_waste, sequence_lengths
from ..paths import resolve_bundled
from ..recipe import Recipe
from ..run_folder.record import RECIPE_FILE, RunIdentity
from .plan import RunPlan, choose_gpu

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Run:
    """A run as far as it is decided before any weights are loaded.

    Attributes:
        recipe: What is learned.
        output_dir: Where the run writes.
        console: Where its lines for the user go.
        started: When it was called, by `time.monotonic`.
        policy: How the machine computes.
        config: The base's configuration.
        tokenizer: The base's tokenizer.
        data: The sequences.
        plan: How steps are carried out.
        identity: What decides what it trains on.
        group: What trackers put it under, such as the name of its sweep.
    """

    recipe: Recipe
    output_dir: Path
    console: Console
    started: float
    policy: PrecisionPolicy
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    plan: RunPlan
    identity: RunIdentity = field(default_factory=RunIdentity)
    group: str | None = None


def policy_of(recipe: Recipe) -> PrecisionPolicy:
    """Return how this machine computes, and set the number of CPU threads."""
    machine = recipe.machine
    choose_gpu()  # first: the policy asks the current GPU what it can do
    quantization = recipe.quantization
    compute_dtype = "auto" if quantization is None else quantization.bnb_4bit_compute_dtype
    policy = resolve_precision(machine.precision, machine.device, compute_dtype)
    if machine.threads != "auto":
        torch.set_num_threads(machine.threads)
    return policy


def model_path(recipe: Recipe) -> str:
    """Return the base's path: a Hub id or a folder, a bundled base as its folder."""
    return resolve_bundled(recipe.model.name_or_path)


def data_of(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    refuse: bool = True,
    progress: Progress | None = None,
    now: datetime | None = None,
) -> PreparedData:
    """Return the sequences a recipe trains on; ``refuse``, ``progress`` and ``now`` as in `prepare_data`."""
    machine = recipe.machine
    return prepare_data(
        tokenizer,
        recipe.data,
        refuse=refuse,
        num_proc=machine.dataset_num_proc,
        streaming=machine.streaming,
        progress=progress,
        now=now,
    )


def report_of(recipe: Recipe, data: PreparedData, plan: RunPlan) -> DataReport:
    """Return the data report, extended by what padding costs under a plan."""
    batch = recipe.train.effective_batch_size
    rows, tokens = plan.per_device_train_batch_size, plan.max_tokens_per_micro_batch
    lengths = sequence_lengths(data.train)  # (N,)
    # An estimate over shuffled steps, split into micro-batches as the trainer splits them.
    waste = padding_waste(lengths, batch, rows, tokens, padding_free=plan.padding_free, seed=recipe.train.seed)
    report, train = data.report.copy(), data.report["train"].copy()
    train["padding_waste"] = waste
    report["train"] = train
    return report


def command_to_continue(output_dir: Path) -> str:
    """Return the shell command that continues a run."""
    # The recipe in the folder, not the file the user gave: overrides are resolved in it, and that file may change.
    return shlex.join(["qlora-neft", "train", str(output_dir / RECIPE_FILE), "--output-dir", str(output_dir)])
