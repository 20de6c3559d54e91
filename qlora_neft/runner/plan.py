"""How a run is carried out on this machine: everything a recipe leaves to ``auto``.

None of these choices changes what is learned.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ..base.model_files import tensors_at_hand
from ..base.precision import PrecisionPolicy
from ..data.prepare import PreparedData
from ..errors import UserInputError
from ..fit import Card, Choice, choose
from ..fit.cards import GIB, host
from ..fit.choose import CPU_TOKENS
from ..fit.geometry import geometry_of
from ..fit.stored import as_stored
from ..fused.flattening import choose_attention
from ..paths import resolve_bundled
from ..recipe import Recipe
from ..recipe.schema import Auto, Machine, Train
from ..trainer.selection import interval

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LOG_LINES, EVALUATIONS = 50, 5  # per run, roughly
EVAL_ROWS = 8  # per evaluation pass
NEED_CUDA = ("use_triton_kernels", "use_liger_kernel", "activation_offloading")  # keys of the machine section
# For bases the planner does not know; `fit.choose` decides for the others.
TOKENS_PER_MICRO_BATCH = 4096  # padding included; unpacking NF4 is then a small part of a matrix product
SMALL_GPU_BYTES = 20 * 2**30  # below this, a quarter of those tokens
# bitsandbytes pages optimizer states between GPU and host; the update itself is that of the plain optimizer.
PLAIN_OPTIMIZERS = {"paged_adamw_32bit": "adamw_torch", "paged_adamw_8bit": "adamw_8bit"}


@dataclass(frozen=True)
class MemoryEstimate:
    """The planner's estimate of a run's peak memory.

    Attributes:
        peak_bytes: All terms together, less what is paged out.
        paged_out_bytes: Optimizer states that a paged optimizer leaves on the host between steps.
        terms: Bytes by name.
    """

    peak_bytes: int
    paged_out_bytes: int
    terms: dict[str, int]


@dataclass(frozen=True)
class RunPlan:
    """A run's machine settings, with nothing left to ``auto``.

    Attributes:
        num_steps: Optimizer steps of the whole run.
        per_device_train_batch_size: Maximum rows of a micro-batch.
        max_tokens_per_micro_batch: Maximum tokens of a micro-batch, padding included; None for no such limit.
        per_device_eval_batch_size: Rows per evaluation pass.
        activation_checkpointing: Whether blocks recompute their activations.
        checkpointed_blocks: How many of them do, counted from the first; None for all.
        padding_free: Whether rows are joined instead of padded.
        attn_implementation: Attention of the training passes, as in ``machine``; "auto" for transformers' choice.
        fused_lora: Whether LoRA layers and MLPs are computed in fused functions.
        fused_norms: Whether RMSNorm is computed in few passes.
        fused_rotary: Whether rotary embeddings are.
        use_triton_kernels, use_liger_kernel: Whether such kernels are used; None wherever they run.
        activation_offloading: Whether what the backward pass needs is kept in host memory.
        torch_compile: Whether blocks are compiled.
        optim: The optimizer; its states are paged only where there is a GPU to page from.
        logging_steps, eval_steps, clean_loss_steps: Optimizer steps between two of each; 0 for never.
        notes: What was decided and why, one line each.
        memory_estimate: None if the planner was not asked, or does not know the base.
    """

    num_steps: int
    per_device_train_batch_size: int
    max_tokens_per_micro_batch: int | None
    per_device_eval_batch_size: int
    activation_checkpointing: bool
    checkpointed_blocks: int | None
    padding_free: bool
    attn_implementation: str
    fused_lora: bool
    fused_norms: bool
    fused_rotary: bool
    use_triton_kernels: bool | None
    use_liger_kernel: bool | None
    activation_offloading: bool
    torch_compile: bool
    optim: str
    logging_steps: int
    eval_steps: int
    clean_loss_steps: int
    notes: tuple[str, ...]
    memory_estimate: MemoryEstimate | None = None


def plan_of(
    recipe: Recipe,
    policy: PrecisionPolicy,
    data: PreparedData,
    config: PretrainedConfig | None = None,
    card: Card | None = None,
) -> RunPlan:
    """Return how a recipe is carried out on this machine.

    Args:
        recipe: What is learned.
        policy: How this machine computes.
        data: The sequences to train on.
        config: The base's configuration; without it nothing is planned by memory.
        card: The device, if it is to be planned for less memory than it has.
    """
    planned = Planned() if config is None else planned_for(recipe, config.to_dict(), card or _card(policy))
    # What the planner chose is filled in as if the user had stated it; plan_run decides what is left.
    machine = recipe.machine.model_copy(update=planned.machine)
    plan = plan_run(recipe.train, machine, num_rows=len(data.train), device=policy.device)
    if config is not None:
        plan = _with_attention(plan, machine, policy, config)
    return replace(plan, notes=(*planned.notes, *plan.notes), memory_estimate=planned.estimate)


def plan_run(train: Train, machine: Machine, *, num_rows: int, device: torch.device) -> RunPlan:
    """Fill in everything the machine section leaves to ``auto``.

    Args:
        train: The recipe's train section.
        machine: The recipe's machine section.
        num_rows: Number of training sequences.
        device: Where the model is.

    Raises:
        UserInputError: If the machine section insists on what this device cannot do.
    """
    _refuse_without_cuda(machine, device)
    batch_size = train.effective_batch_size
    num_steps = _num_steps(train, num_rows)
    checkpointing, blocks, checkpointing_note = _checkpointing(machine.activation_checkpointing, device)
    rows = machine.per_device_train_batch_size
    tokens, tokens_note = _tokens(machine.max_tokens_per_micro_batch, rows, device)
    optim, optim_note = _optimizer(train.optim, device)
    judged = interval(train.selection_steps, num_steps) if train.selects else None
    eval_steps = _auto(
        machine.eval_steps, judged or math.ceil(num_steps / EVALUATIONS)
    )  # never 0, which would be "never"
    return RunPlan(
        num_steps=num_steps,
        # A micro-batch is part of one optimizer step: rows beyond the step would belong to the next.
        per_device_train_batch_size=min(_auto(rows, batch_size), batch_size),
        max_tokens_per_micro_batch=tokens,
        per_device_eval_batch_size=_auto(machine.per_device_eval_batch_size, EVAL_ROWS),
        activation_checkpointing=checkpointing,
        checkpointed_blocks=blocks,
        padding_free=machine.padding_free is True,  # without a model, only what is stated; see `_with_attention`
        attn_implementation=machine.attn_implementation,
        fused_lora=machine.fused_lora is not False,
        fused_norms=machine.fused_norms is not False,
        fused_rotary=machine.fused_rotary is not False,
        use_triton_kernels=_wish(machine.use_triton_kernels),
        use_liger_kernel=_wish(machine.use_liger_kernel),
        activation_offloading=machine.activation_offloading is True,
        torch_compile=machine.torch_compile,
        optim=optim,
        logging_steps=_auto(machine.logging_steps, max(1, num_steps // LOG_LINES)),
        eval_steps=eval_steps,
        clean_loss_steps=_auto(machine.clean_loss_steps, eval_steps),  # so that both curves have the same points
        notes=tuple(
            note for note in (tokens_note, checkpointing_note, optim_note, _selection(train, num_steps)) if note
        ),
    )


def _with_attention(plan: RunPlan, machine: Machine, policy: PrecisionPolicy, config: PretrainedConfig) -> RunPlan:
    """Decide by device and model family whether rows are joined, and how they are attended over."""
    try:
        choice = choose_attention(
            config,
            policy.device,
            policy.compute_dtype,
            padding_free=None if machine.padding_free == "auto" else machine.padding_free,
            implementation=machine.attn_implementation,
        )
    except UserInputError as error:
        raise UserInputError(f"machine.{error}") from None
    notes = (*plan.notes, choice.note) if choice.note else plan.notes
    return replace(plan, padding_free=choice.padding_free, attn_implementation=choice.implementation, notes=notes)


def _refuse_without_cuda(machine: Machine, device: torch.device) -> None:
    asked = [key for key in NEED_CUDA if getattr(machine, key) is True]
    if asked and device.type != "cuda":
        raise UserInputError(
            "\n".join(
                f"machine.{key}: needs a CUDA device, and this run is on {device.type}, got true. Use auto."
                for key in asked
            )
        )


def _wish(asked: bool | Auto) -> bool | None:
    """Return a switch as the trainer takes it, which decides when it knows the model."""
    return None if asked == "auto" else asked


def _num_steps(train: Train, num_rows: int) -> int:
    """Return the optimizer steps of the whole run; a part of a pass is rounded up to whole steps."""
    per_epoch = math.ceil(num_rows / train.effective_batch_size)
    # Rounded first: 1.1 epochs of 10 steps are 11.000000000000002 in binary.
    num_steps = max(1, math.ceil(round(train.num_train_epochs * per_epoch, 6)))
    return num_steps if train.max_steps is None else min(num_steps, train.max_steps)


def _auto(value: int | Auto, otherwise: int) -> int:
    return otherwise if value == "auto" else value


def _tokens(limit: int | Auto, rows: int | Auto, device: torch.device) -> tuple[int | None, str]:
    """Return the tokens of a micro-batch, and a note if they were chosen here."""
    if limit != "auto":
        return limit, ""
    if rows != "auto":  # whoever states the rows wants that many, however long they are
        return None, ""
    budget = TOKENS_PER_MICRO_BATCH if device.type == "cuda" else CPU_TOKENS
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < SMALL_GPU_BYTES:
        budget //= 4
    return budget, f"micro-batches: up to {budget} tokens each, padding counted"


def _checkpointing(asked: bool | int | Auto, device: torch.device) -> tuple[bool, int | None, str]:
    """Return whether blocks recompute their activations, how many do (None: all), and a note if chosen here."""
    if asked == "auto":
        on = device.type == "cuda"
        where = "on: recomputing saves GPU memory" if on else "off: this device has memory to spare"
        return on, None, f"activation checkpointing: {where}"
    # bool before int: True is an int too, and as a number of blocks it would mean one.
    if isinstance(asked, bool):
        return asked, None, ""
    return asked > 0, asked, ""


def _optimizer(asked: str, device: torch.device) -> tuple[str, str]:
    if device.type == "cuda" or asked not in PLAIN_OPTIMIZERS:
        return asked, ""
    plain = PLAIN_OPTIMIZERS[asked]
    return plain, f"optimizer: {plain}, the same update as {asked}; there is no GPU memory to page out of"


def _selection(train: Train, num_steps: int) -> str:
    """Return what decides by held-out rows which weights are the result, and how often; empty if nothing does."""
    if not train.selects:
        return ""
    every, patience = interval(train.selection_steps, num_steps), train.early_stopping_patience
    count = math.ceil(num_steps / every)  # without step 0, which is measured in any case
    times = "1 evaluation" if count == 1 else f"{count} evaluations"
    what = [f"train.keep: {train.keep}"]
    if patience is not None:
        # After the best step, which is 0 at the earliest, come as many judgements as are left.
        never = f", which {times} cannot reach before the last step" if patience >= count else ""
        what.append(f"train.early_stopping_patience: {patience}{never}")
    return f"{' and '.join(what)}, by {times} of all held-out rows, every {every} steps"


# ---- By memory ----


@dataclass(frozen=True)
class Planned:
    """The planner's choices for a run, by the memory of its card.

    Attributes:
        machine: Its choices for keys of the machine section that were ``auto``.
        notes: Its decisions, one line each.
        estimate: None for a base the planner does not know.
    """

    machine: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    estimate: MemoryEstimate | None = None


def planned_for(recipe: Recipe, config: Mapping[str, Any], card: Card) -> Planned:
    """Plan a run for a card.

    Args:
        recipe: What is learned.
        config: The base's ``config.json``.
        card: The device, with the memory it really has.
    """
    try:
        path = resolve_bundled(recipe.model.name_or_path)
        # Where a checkpoint's files differ from its configuration, they are what is loaded.
        geometry, _ = as_stored(geometry_of(config), path, tensors_at_hand(path, recipe.model.revision))
        choice, fits = choose(recipe, geometry, card)
    except UserInputError as error:  # an unknown architecture is no reason to refuse: it is planned by rule of thumb
        return Planned(notes=(f"memory: not planned ({error})",))
    estimate = MemoryEstimate(choice.peak_bytes, choice.paged_out, choice.terms)
    return Planned(_machine(recipe, choice, card), _notes(choice, card, fits=fits), estimate)


def _machine(recipe: Recipe, choice: Choice, card: Card) -> dict[str, Any]:
    if not card.is_gpu:  # on a CPU there is one way only
        return {}
    chosen = {
        "max_tokens_per_micro_batch": choice.tokens,
        "activation_checkpointing": choice.checkpointing,
        "activation_offloading": choice.step.offloading,
        "per_device_eval_batch_size": choice.eval_rows or None,  # 0: there are no held-out rows
    }
    machine = recipe.machine
    # What the user stated is never overruled, even where the planner would choose otherwise.
    return {key: value for key, value in chosen.items() if getattr(machine, key) == "auto" and value is not None}


def _notes(choice: Choice, card: Card, *, fits: bool) -> tuple[str, ...]:
    if not card.is_gpu:
        return ()
    peak = f"memory: {choice.peak_bytes / GIB:.1f} of {card.memory / GIB:.1f} GiB by the estimate"
    paged = f"; {choice.paged_out / GIB:.1f} GiB of optimizer states are paged to the host" if choice.paged_out else ""
    doubt = "" if fits else "; it may not fit, and would end with a plan of what to change (qlora-neft fit says more)"
    blocks = choice.checkpointing
    on = ("on" if blocks else "off") if isinstance(blocks, bool) else f"in {blocks} blocks of {choice.num_layers}"
    offloading = ", activations kept in host memory" if choice.step.offloading else ""
    return (
        peak + paged + doubt,
        f"planned, the fastest that fits: micro-batches of up to {choice.step.tokens} tokens, checkpointing {on}"
        + offloading,
    )


def _card(policy: PrecisionPolicy) -> Card:
    """Return the device of this run, with the memory it really has."""
    if policy.device.type != "cuda":
        return host()
    device = torch.cuda.get_device_properties(policy.device)
    return Card(device.name, device.total_memory, has_bf16=policy.compute_dtype == torch.bfloat16)


# ---- Processes ----

# Read from the environment that torchrun and accelerate set: they are asked before any process group exists.


def num_processes() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process writes and speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def uses_fsdp() -> bool:
    """Return whether ``accelerate launch`` asks for fully sharded data parallelism."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def choose_gpu() -> None:
    """Make this process's own GPU the current one if several processes share a machine."""
    if num_processes() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
