"""Memory during training: how large a micro-batch may be, and the peak that the first step of a session reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..fit.cards import GIB
from ..fit.choose import USABLE


@dataclass(frozen=True)
class Split:
    """The largest micro-batch that an optimizer step is split into.

    Attributes:
        rows: Maximum number of sequences.
        tokens: Maximum number of tokens, padding counted; None for no limit.
        is_smaller: Whether the run began with larger ones.
    """

    rows: int
    tokens: int | None = None
    is_smaller: bool = False

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else f" and {self.tokens} tokens"
        return f"micro-batches of at most {self.rows} {'sequence' if self.rows == 1 else 'sequences'}{tokens}"

    def at_most(self, rows: int, tokens: int | None) -> Split:
        """Return the stricter of two splits, limit by limit."""
        limits = [limit for limit in (self.tokens, tokens) if limit is not None]
        return Split(min(self.rows, rows), min(limits) if limits else None, is_smaller=True)

    def half_of(self, rows: int, tokens: int) -> Split:
        """Return a split in which a micro-batch that did not fit would be at least two.

        Args:
            rows: Sequences of that micro-batch, more than one.
            tokens: Its tokens, padding counted.
        """
        return self.at_most(rows // 2, None if self.tokens is None else max(tokens // 2, 1))


def too_large(tokens: int, rows: int, error: str) -> str:
    """Say what to change when nothing smaller is left to try."""
    what = f"one sequence of {tokens} tokens" if rows <= 1 else f"a micro-batch of {rows} sequences"
    detail = error.strip().splitlines()[0] if error.strip() else "out of memory"
    return (
        f"out of memory: {what} does not fit on this device ({detail}). In this order: "
        # Cheapest first: this one costs time alone, the next ones change what is learned.
        "machine.activation_checkpointing=true, a lower data.max_length, optim paged_adamw_8bit, a lower lora.r, a "
        "smaller base. What was learned so far is in the newest checkpoint; machine settings may change on a resume."
    )


class Probed(Protocol):
    """The part of a trainer that `MemoryProbe` reads and changes."""

    split: Split
    say: Callable[[str], None]


class MemoryProbe(TrainerCallback):
    """Read the peak after the first step of a session; if it is too near the limit, halve the micro-batches once.

    Effective batch, noise and loss stay the same.

    Args:
        trainer: Its ``split`` may be changed, and its ``say`` is told.
        total: Memory of the card, bytes.
        estimate: Peak the planner expected, bytes; None if it was not asked.
        read_peak: Returns the peak so far, bytes.
    """

    def __init__(self, trainer: Probed, total: int, estimate: int | None, read_peak: Callable[[], int]) -> None:
        self.trainer, self.total, self.estimate, self.read_peak = trainer, total, estimate, read_peak
        self.measured: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read the peak, once."""
        if self.measured is not None:
            return
        self.measured = self.read_peak()
        expected = "" if self.estimate is None else f", {self.estimate / GIB:.2f} GiB expected"
        self.trainer.say(f"memory: {self.measured / GIB:.2f} GiB after the first step{expected}")
        split = self.trainer.split
        # A later step may have longer rows than this one; better to halve now than to run out in the middle of a step.
        if self.measured > USABLE * self.total and split.rows > 1:
            self.trainer.split = split.half_of(split.rows, split.tokens or 0)
            self.trainer.say(
                f"memory: too near the limit of {self.total / GIB:.2f} GiB; going on with {self.trainer.split}"
            )


def cuda_probe(trainer: Any, estimate: int | None) -> MemoryProbe | None:
    """Return a probe of the trainer's GPU, None on a CPU."""
    device = trainer.args.device
    if device.type != "cuda":
        return None
    # Forget the peak of loading: 16-bit weights pass through the card on their way to NF4.
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    # Reserved, not allocated: what the caching allocator holds is what the card no longer has.
    return MemoryProbe(trainer, total, estimate, lambda: torch.cuda.max_memory_reserved(device))
