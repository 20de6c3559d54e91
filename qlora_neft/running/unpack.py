"""What a recipe states about data and machine, handed to the parts as flat arguments.

With `unpack_trainer` and `run`, the only rooms that see a `Recipe`. Nothing here imports PEFT, TRL or bitsandbytes,
which a look at the data does not need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..data import Limits, PreparedData, Settings, Source, prepare_data
from ..data.lengths import padding_waste, sequence_lengths
from ..files.bundled import resolve_bundled
from ..fit import Card
from ..fit.cards import host
from ..precision import PrecisionPolicy, resolve_precision
from ..recipe import Recipe
from .plan import RunPlan, plan_run
from .processes import choose_gpu
from .unpack_fit import Planned, planned_for


def policy_of(recipe: Recipe) -> PrecisionPolicy:
    """How this machine computes; sets the number of CPU threads."""
    machine = recipe.machine
    choose_gpu()
    policy = resolve_precision(machine.precision, machine.device, recipe.quantization.bnb_4bit_compute_dtype)
    if machine.threads != "auto":
        torch.set_num_threads(machine.threads)
    return policy


def model_path(recipe: Recipe) -> str:
    """The base, a bundled one as a folder."""
    return resolve_bundled(recipe.model.name_or_path)


def data_of(
    recipe: Recipe, tokenizer: Any, *, refuse: bool = True, progress: Callable[[int], None] | None = None
) -> PreparedData:
    """The sequences a recipe trains on; ``refuse`` and ``progress`` as in `prepare_data`."""
    data, machine = recipe.data, recipe.machine
    return prepare_data(
        tokenizer,
        sources=[_source(data), *(_source(source) for source in data.mixture)],
        eval_sources=_eval_sources(data),
        eval_fraction=data.eval_fraction,
        settings=Settings(data.max_length, data.train_on_prompt, data.keep_end_token, data.split_conversations),
        limits=Limits(data.max_dropped_fraction, data.max_truncated_fraction, data.max_duplicate_fraction),
        refuse=refuse,
        num_proc=machine.dataset_num_proc,
        streaming=machine.streaming,
        progress=progress,
    )


def _source(entry: Any) -> Source:
    """A source from the data section, or from an entry of its mixture."""
    names = ("split", "revision", "data_files", "name", "weight", "format", "prompt_template")
    return Source(resolve_bundled(entry.path), **{name: getattr(entry, name) for name in names})


def _eval_sources(data: Any) -> list[Source]:
    if data.eval_path is None and data.eval_split is None:
        return []
    common = {"format": data.format, "prompt_template": data.prompt_template}
    if data.eval_path is None:  # another split of the same data
        hub = {"revision": data.revision, "data_files": data.data_files, "name": data.name}
        return [Source(resolve_bundled(data.path), data.eval_split, **hub, **common)]
    path = resolve_bundled(data.eval_path)
    return [Source(path, data.eval_split or "train", **common, key="data.eval_path")]


def plan_of(recipe: Recipe, policy: PrecisionPolicy, data: PreparedData, config: Any = None) -> RunPlan:
    """How the run is carried out on this machine.

    Args:
        recipe: What is learned.
        policy: How this machine computes.
        data: With the number of rows.
        config: Of the base; without it nothing is planned by memory.
    """
    train, machine = recipe.train, recipe.machine
    planned = Planned() if config is None else planned_for(recipe, config.to_dict(), _card(policy))
    names = ("per_device_train_batch_size", "max_tokens_per_micro_batch", "per_device_eval_batch_size")
    names += ("activation_checkpointing", "padding_free", "logging_steps", "eval_steps", "clean_loss_steps")
    plan = plan_run(
        num_rows=len(data.train),
        effective_batch_size=train.effective_batch_size,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        optim=train.optim,
        device=policy.device,
        **{name: planned.machine.get(name, getattr(machine, name)) for name in names},
    )
    return replace(plan, notes=(*planned.notes, *plan.notes), memory_estimate=planned.estimate)


def _card(policy: PrecisionPolicy) -> Card:
    """The device this run is on, with the memory it really has."""
    if policy.device.type != "cuda":
        return host()
    device = torch.cuda.get_device_properties(policy.device)
    return Card(device.name, device.total_memory, has_bf16=policy.compute_dtype == torch.bfloat16)


def report_of(recipe: Recipe, data: PreparedData, plan: RunPlan) -> dict[str, Any]:
    """The data report, with what padding costs under the plan."""
    batch = recipe.train.effective_batch_size
    rows, tokens = plan.per_device_train_batch_size, plan.max_tokens_per_micro_batch
    lengths = sequence_lengths(data.train)
    waste = padding_waste(lengths, batch, rows, tokens, padding_free=plan.padding_free, seed=recipe.train.seed)
    return {**data.report, "train": {**data.report["train"], "padding_waste": waste}}
