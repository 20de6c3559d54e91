"""What a recipe states about data and machine, handed to the parts as flat arguments.

With `unpack_trainer` and `run`, the only rooms that see a `Recipe`. Nothing here imports PEFT, TRL or bitsandbytes,
which a look at the data does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from ..base.lora import lora_config
from ..base.nf4 import load_nf4_base, nf4_config
from ..base.precision import PrecisionPolicy, resolve_precision
from ..data.prepare import PreparedData, prepare_data
from ..data.report import padding_waste, sequence_lengths
from ..errors import UserInputError
from ..fit import Card, Choice, Wanted, choose
from ..fit.cards import GIB, host
from ..fit.geometry import geometry_of
from ..paths import resolve_bundled
from ..recipe import Recipe
from ..recipe.schema import Neftune
from ..trainer import QLoRANeftConfig, QLoRANeftTrainer
from .plan import RunPlan, choose_gpu, num_processes, plan_run, uses_fsdp


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


def wanted(recipe: Recipe) -> Wanted:
    """What the planner has to keep to, and what it may choose."""
    machine, targets = recipe.machine, recipe.lora.target_modules
    checkpointing = machine.activation_checkpointing
    return Wanted(
        max_length=recipe.data.max_length,
        effective_batch_size=recipe.train.effective_batch_size,
        r=recipe.lora.r,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        double_quant=recipe.quantization.bnb_4bit_use_double_quant,
        optim=recipe.train.optim,
        rows=_chosen(machine.per_device_train_batch_size),
        tokens=_chosen(machine.max_tokens_per_micro_batch),
        checkpointing=None if checkpointing == "auto" else bool(checkpointing),
        eval_rows=_chosen(machine.per_device_eval_batch_size) if recipe.data.has_eval_rows else 0,
        passes=_passes(recipe.neftune),
    )


def _passes(noise: Neftune | None) -> int:
    """Forward and backward passes of a step; without noise there is nothing to climb."""
    return noise.adversarial_steps if noise is not None and (noise.noise_alpha or noise.final_alpha) else 1


def planned_for(recipe: Recipe, config: Mapping[str, Any], card: Card) -> Planned:
    """Plan a run on a card that is there.

    Args:
        recipe: What is learned.
        config: Of the base, as in ``config.json``.
        card: The device, with the memory it really has.
    """
    try:
        geometry = geometry_of(config)
        choice, fits = choose(geometry, wanted(recipe), card)
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


def _chosen(value: int | str) -> int | None:
    return None if value == "auto" else int(value)


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
    machine = recipe.machine
    return prepare_data(
        tokenizer,
        recipe.data,
        refuse=refuse,
        num_proc=machine.dataset_num_proc,
        streaming=machine.streaming,
        progress=progress,
    )


def plan_of(recipe: Recipe, policy: PrecisionPolicy, data: PreparedData, config: Any = None) -> RunPlan:
    """How the run is carried out on this machine.

    Args:
        recipe: What is learned.
        policy: How this machine computes.
        data: With the number of rows.
        config: Of the base; without it nothing is planned by memory.
    """
    planned = Planned() if config is None else planned_for(recipe, config.to_dict(), _card(policy))
    machine = recipe.machine.model_copy(update=planned.machine)
    plan = plan_run(recipe.train, machine, num_rows=len(data.train), device=policy.device)
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


def trainer_of(
    trainer_class: type[QLoRANeftTrainer],
    recipe: Recipe,
    policy: PrecisionPolicy,
    plan: RunPlan,
    tokenizer: Any,
    data: PreparedData,
    output_dir: Path,
) -> QLoRANeftTrainer:
    """The trainer, its NF4 base loaded and its adapters added."""
    model = load_nf4_base(
        model_path(recipe),
        device=policy.device,
        compute_dtype=policy.compute_dtype,
        quantization_config=nf4_config(
            recipe.quantization, policy.compute_dtype, quant_storage=_quant_storage(recipe, policy)
        ),
        revision=recipe.model.revision,
    )
    trainer = trainer_class(
        model,
        _arguments(recipe, policy, plan, has_eval=data.eval is not None, output_dir=output_dir),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.lora),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(
    recipe: Recipe, policy: PrecisionPolicy, plan: RunPlan, *, has_eval: bool, output_dir: Path
) -> QLoRANeftConfig:
    train, neftune, machine = recipe.train, recipe.neftune, recipe.machine
    noise = {} if neftune is None else {f"neftune_{key}": value for key, value in neftune.model_dump().items()}
    # The step is the recipe's; how it is split is the plan's. The trainer multiplies these two back together.
    return QLoRANeftConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=-(-train.effective_batch_size // num_processes()),
        effective_batch_size=train.effective_batch_size,
        micro_batch_size=plan.per_device_train_batch_size,
        max_tokens_per_micro_batch=plan.max_tokens_per_micro_batch,
        per_device_eval_batch_size=plan.per_device_eval_batch_size,
        gradient_checkpointing=plan.activation_checkpointing,
        checkpointed_blocks=plan.checkpointed_blocks,
        padding_free=plan.padding_free,
        max_steps=plan.num_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        optim=plan.optim,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        logging_steps=plan.logging_steps,
        logging_first_step=True,
        clean_loss_steps=plan.clean_loss_steps,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=plan.eval_steps,
        dataloader_num_workers=recipe.machine.dataloader_num_workers,
        dataloader_pin_memory=policy.device.type == "cuda",
        bf16=policy.amp == "bf16",
        fp16=policy.amp == "fp16",
        use_cpu=policy.device.type == "cpu",
        max_length=None,  # rows are cut already, and counted
        save_strategy="steps" if machine.save_steps not in ("auto", 0) else "no",
        save_steps=machine.save_steps if machine.save_steps not in ("auto", 0) else 500,
        save_total_limit=machine.save_total_limit,
        max_bad_steps=train.max_bad_steps,
        report_to="none",
        disable_tqdm=True,
        **noise,
    )


def _quant_storage(recipe: Recipe, policy: PrecisionPolicy) -> torch.dtype:
    """What the NF4 bytes are declared as.

    Raises:
        UserInputError: If FSDP is asked for and would not shard them.
    """
    wanted = recipe.machine.bnb_4bit_quant_storage
    storage = torch.uint8 if wanted == "auto" else getattr(torch, wanted)
    if uses_fsdp() and storage != policy.compute_dtype:
        raise UserInputError(
            "machine.bnb_4bit_quant_storage: must be the compute dtype under FSDP, which shards no other "
            f"({str(policy.compute_dtype).removeprefix('torch.')}), got {wanted}."
        )
    return storage
