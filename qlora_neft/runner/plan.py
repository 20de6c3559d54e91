"""How a run is carried out on this machine: everything a recipe leaves to ``auto``.

None of these choices changes what is learned.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from ..fit.choose import CPU_TOKENS
from ..recipe.schema import Auto, Machine, Train

LOG_LINES = 50  # per run, roughly
EVALUATIONS = 5  # per run, roughly
EVAL_ROWS = 8  # per evaluation pass
TOKENS_PER_MICRO_BATCH = 4096  # padded; the NF4 dequantization is then a small part of a matrix product
SMALL_GPU_BYTES = 20 * 2**30
PLAIN_OPTIMIZERS = {"paged_adamw_32bit": "adamw_torch", "paged_adamw_8bit": "adamw_8bit"}


@dataclass(frozen=True)
class RunPlan:
    """Resolved machine settings.

    Attributes:
        num_steps: Optimizer steps of the whole run.
        per_device_train_batch_size: Largest micro-batch, in rows.
        max_tokens_per_micro_batch: Largest micro-batch, in tokens with padding; None for no such limit.
        per_device_eval_batch_size: Rows per evaluation pass.
        activation_checkpointing: Whether blocks recompute their activations.
        checkpointed_blocks: How many do, from the first; None for all.
        padding_free: Whether rows are flattened instead of padded.
        optim: Optimizer, its states paged only where there is a GPU to page from.
        logging_steps, eval_steps, clean_loss_steps: Optimizer steps between two of each; 0 for never.
        notes: What was decided and why, one line each.
        memory_estimate: ``peak_bytes`` and ``terms`` by the planner, None where it was not asked.
    """

    num_steps: int
    per_device_train_batch_size: int
    max_tokens_per_micro_batch: int | None
    per_device_eval_batch_size: int
    activation_checkpointing: bool
    checkpointed_blocks: int | None
    padding_free: bool
    optim: str
    logging_steps: int
    eval_steps: int
    clean_loss_steps: int
    notes: tuple[str, ...]
    memory_estimate: dict[str, Any] | None = None


def plan_run(train: Train, machine: Machine, *, num_rows: int, device: torch.device) -> RunPlan:
    """Fill in everything the machine section leaves to ``auto``.

    Args:
        train: The recipe's train section.
        machine: The recipe's machine section.
        num_rows: Number of training sequences.
        device: Where the model is.
    """
    batch_size = train.effective_batch_size
    num_steps = _num_steps(train, num_rows)
    checkpointing, blocks, checkpointing_note = _checkpointing(machine.activation_checkpointing, device)
    rows = machine.per_device_train_batch_size
    tokens, tokens_note = _tokens(machine.max_tokens_per_micro_batch, rows, device)
    optim, optim_note = _optimizer(train.optim, device)
    eval_steps = _auto(machine.eval_steps, math.ceil(num_steps / EVALUATIONS))
    return RunPlan(
        num_steps=num_steps,
        per_device_train_batch_size=min(_auto(rows, batch_size), batch_size),
        max_tokens_per_micro_batch=tokens,
        per_device_eval_batch_size=_auto(machine.per_device_eval_batch_size, EVAL_ROWS),
        activation_checkpointing=checkpointing,
        checkpointed_blocks=blocks,
        padding_free=machine.padding_free is True,
        optim=optim,
        logging_steps=_auto(machine.logging_steps, max(1, num_steps // LOG_LINES)),
        eval_steps=eval_steps,
        clean_loss_steps=_auto(machine.clean_loss_steps, eval_steps),
        notes=tuple(note for note in (tokens_note, checkpointing_note, optim_note) if note),
    )


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
    if rows != "auto":
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
    if isinstance(asked, bool):
        return asked, None, ""
    return asked > 0, asked, ""


def _optimizer(asked: str, device: torch.device) -> tuple[str, str]:
    if device.type == "cuda" or asked not in PLAIN_OPTIMIZERS:
        return asked, ""
    plain = PLAIN_OPTIMIZERS[asked]
    return plain, f"optimizer: {plain}, the same update as {asked}; there is no GPU memory to page out of"


# ---- Processes ----


def num_processes() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this one writes and speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def uses_fsdp() -> bool:
    """Whether ``accelerate launch`` asks for fully sharded data parallelism."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def choose_gpu() -> None:
    """Make this process's own GPU the current one, where there are several processes on a machine."""
    if num_processes() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
