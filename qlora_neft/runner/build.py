"""The parts of a run that need no weights: how the machine computes, the data, the plan.

Nothing here imports PEFT, TRL or bitsandbytes, which a look at the data does not need; see `build_trainer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..base.precision import PrecisionPolicy, resolve_precision
from ..data.prepare import PreparedData, Progress, prepare_data
from ..data.report import padding_waste, sequence_lengths
from ..errors import UserInputError
from ..fit import Card, Choice, choose
from ..fit.cards import GIB, host
from ..fit.geometry import geometry_of
from ..paths import resolve_bundled
from ..recipe import Recipe
from .plan import RunPlan, choose_gpu, plan_run

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


@dataclass(frozen=True)
class Planned:
    """What the planner chose for a run.

    Attributes:
        machine: Keys of the machine section that were ``auto``, with its choices.
        notes: Its decisions, one line each.
        estimate: ``peak_bytes``, ``usable`` and ``terms`` in bytes; None for a base the planner does not know.
    """

    machine: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    estimate: dict[str, Any] | None = None


def planned_for(recipe: Recipe, config: Mapping[str, Any], card: Card) -> Planned:
    """Plan a run on a card that is there.

    Args:
        recipe: What is learned.
        config: Of the base, as in ``config.json``.
        card: The device, with the memory it really has.
    """
    try:
        geometry = geometry_of(config)
        choice, fits = choose(recipe, geometry, card)
    except UserInputError as error:
        return Planned(notes=(f"memory: not planned ({error})",))
    estimate = {"peak_bytes": choice.peak_bytes, "paged_out_bytes": choice.paged_out, "terms": choice.terms}
    return Planned(_machine(recipe, choice, card), _notes(choice, card, fits=fits), estimate)


def _machine(recipe: Recipe, choice: Choice, card: Card) -> dict[str, Any]:
    if not card.is_gpu:  # there is one way only
        return {}
    chosen = {
        "max_tokens_per_micro_batch": choice.tokens,
        "activation_checkpointing": choice.step.checkpointing,
        "per_device_eval_batch_size": choice.eval_rows or None,
    }
    asked = recipe.machine.model_dump()
    return {key: value for key, value in chosen.items() if asked[key] == "auto" and value is not None}


def _notes(choice: Choice, card: Card, *, fits: bool) -> tuple[str, ...]:
    if not card.is_gpu:
        return ()
    peak = f"memory: {choice.peak_bytes / GIB:.1f} of {card.memory / GIB:.1f} GiB by the estimate"
    paged = f"; {choice.paged_out / GIB:.1f} GiB of optimizer states are paged to the host" if choice.paged_out else ""
    doubt = "" if fits else "; it may not fit, and would end with a plan of what to change (qlora-neft fit says more)"
    on = "on" if choice.step.checkpointing else "off"
    return (
        peak + paged + doubt,
        f"planned, the fastest that fits: micro-batches of up to {choice.step.tokens} tokens, checkpointing {on}",
    )


def policy_of(recipe: Recipe) -> PrecisionPolicy:
    """Return how this machine computes, and set the number of CPU threads."""
    machine = recipe.machine
    choose_gpu()
    policy = resolve_precision(machine.precision, machine.device, recipe.quantization.bnb_4bit_compute_dtype)
    if machine.threads != "auto":
        torch.set_num_threads(machine.threads)
    return policy


def model_path(recipe: Recipe) -> str:
    """Return the base's path: a Hub id or a folder, a bundled base as its folder."""
    return resolve_bundled(recipe.model.name_or_path)


def data_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, refuse: bool = True, progress: Progress | None = None
) -> PreparedData:
    """Return the sequences a recipe trains on; ``refuse`` and ``progress`` as in `prepare_data`."""
    machine = recipe.machine
    return prepare_data(
        tokenizer,
        recipe.data,
        refuse=refuse,
        num_proc=machine.dataset_num_proc,
        streaming=machine.streaming,
        progress=progress,
    )


def plan_of(
    recipe: Recipe, policy: PrecisionPolicy, data: PreparedData, config: PretrainedConfig | None = None
) -> RunPlan:
    """Return how the run is carried out on this machine.

    Args:
        recipe: What is learned.
        policy: How this machine computes.
        data: The sequences to train on.
        config: The base's configuration; without it nothing is planned by memory.
    """
    planned = Planned() if config is None else planned_for(recipe, config.to_dict(), _card(policy))
    machine = recipe.machine.model_copy(update=planned.machine)
    plan = plan_run(recipe.train, machine, num_rows=len(data.train), device=policy.device)
    return replace(plan, notes=(*planned.notes, *plan.notes), memory_estimate=planned.estimate)


def _card(policy: PrecisionPolicy) -> Card:
    """Return the device of this run, with the memory it really has."""
    if policy.device.type != "cuda":
        return host()
    device = torch.cuda.get_device_properties(policy.device)
    return Card(device.name, device.total_memory, has_bf16=policy.compute_dtype == torch.bfloat16)


def report_of(recipe: Recipe, data: PreparedData, plan: RunPlan) -> dict[str, Any]:
    """Return the data report, extended by what padding costs under a plan."""
    batch = recipe.train.effective_batch_size
    rows, tokens = plan.per_device_train_batch_size, plan.max_tokens_per_micro_batch
    lengths = sequence_lengths(data.train)
    waste = padding_waste(lengths, batch, rows, tokens, padding_free=plan.padding_free, seed=recipe.train.seed)
    return {**data.report, "train": {**data.report["train"], "padding_waste": waste}}
