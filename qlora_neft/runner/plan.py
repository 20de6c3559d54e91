"""How a run is carried out on this machine: everything a recipe leaves to ``auto``, one line each.

Flat numbers in, flat numbers out. None of these choices changes what is learned.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from ..fit.choose import CPU_TOKENS

LOG_LINES = 50  # about so many log lines a run
EVALUATIONS = 5  # about so many evaluations a run
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


def plan_run(
    *,
    num_rows: int,
    effective_batch_size: int,
    num_train_epochs: float,
    max_steps: int | None,
    optim: str,
    device: torch.device,
    per_device_train_batch_size: int | str = "auto",
    max_tokens_per_micro_batch: int | str = "auto",
    per_device_eval_batch_size: int | str = "auto",
    activation_checkpointing: bool | int | str = "auto",
    padding_free: bool | str = "auto",
    logging_steps: int | str = "auto",
    eval_steps: int | str = "auto",
    clean_loss_steps: int | str = "auto",
) -> RunPlan:
    """Fill in every ``"auto"``.

    Args:
        num_rows: Training rows.
        effective_batch_size: Sequences per optimizer step.
        num_train_epochs: Passes over the rows; a part of a pass is rounded up to whole steps.
        max_steps: Upper limit on optimizer steps, or None.
        optim: Optimizer the recipe asks for.
        device: Where the model lives.

    The remaining arguments are the recipe's ``machine`` section, see `RunPlan`.
    """
    # Rounded first: 1.1 epochs of 10 steps are 11.000000000000002 in binary.
    num_steps = max(1, math.ceil(round(num_train_epochs * math.ceil(num_rows / effective_batch_size), 6)))
    num_steps = num_steps if max_steps is None else min(num_steps, max_steps)
    checkpointing, blocks, why = _checkpointing(activation_checkpointing, device)
    rows = effective_batch_size if per_device_train_batch_size == "auto" else int(per_device_train_batch_size)
    tokens, tokens_note = _tokens(max_tokens_per_micro_batch, per_device_train_batch_size, device)
    chosen_optim, optim_note = _optimizer(optim, device)
    every = _auto(eval_steps, math.ceil(num_steps / EVALUATIONS))
    return RunPlan(
        num_steps=num_steps,
        per_device_train_batch_size=min(rows, effective_batch_size),
        max_tokens_per_micro_batch=tokens,
        per_device_eval_batch_size=_auto(per_device_eval_batch_size, 8),
        activation_checkpointing=checkpointing,
        checkpointed_blocks=blocks,
        padding_free=padding_free is True,
        optim=chosen_optim,
        logging_steps=_auto(logging_steps, max(1, num_steps // LOG_LINES)),
        eval_steps=every,
        clean_loss_steps=_auto(clean_loss_steps, every),
        notes=tuple(note for note in (tokens_note, why, optim_note) if note),
    )


def _auto(value: int | str, otherwise: int) -> int:
    return otherwise if value == "auto" else int(value)


def _tokens(wanted: int | str, rows: int | str, device: torch.device) -> tuple[int | None, str]:
    if wanted != "auto":
        return int(wanted), ""
    if rows != "auto":
        return None, ""
    budget = TOKENS_PER_MICRO_BATCH if device.type == "cuda" else CPU_TOKENS
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < SMALL_GPU_BYTES:
        budget //= 4
    return budget, f"micro-batches: up to {budget} tokens each, padding counted"


def _checkpointing(wanted: bool | int | str, device: torch.device) -> tuple[bool, int | None, str]:
    if wanted == "auto":
        on = device.type == "cuda"
        where = "on: recomputing saves GPU memory" if on else "off: this device has memory to spare"
        return on, None, f"activation checkpointing: {where}"
    if isinstance(wanted, bool):
        return wanted, None, ""
    return wanted > 0, wanted, ""


def _optimizer(wanted: str, device: torch.device) -> tuple[str, str]:
    if device.type == "cuda" or wanted not in PLAIN_OPTIMIZERS:
        return wanted, ""
    plain = PLAIN_OPTIMIZERS[wanted]
    return plain, f"optimizer: {plain}, the same update as {wanted}; there is no GPU memory to page out of"


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
