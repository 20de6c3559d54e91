"""The first step's real peak of memory beside the estimate, and one correction of the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from ..fit.cards import GIB
from ..fit.choose import USABLE
from .smaller_steps import smaller


class MemoryProbe(TrainerCallback):
    """Reads the peak after the first step of a session; where it is too near the limit, micro-batches are halved once.

    The effective batch, the noise and the loss stay as they are.

    Args:
        trainer: Whose ``split`` it may change; its ``say`` is told.
        total: Bytes of the card.
        estimate: Bytes the planner expected, None if it was not asked.
        read_peak: Gives the peak so far, in bytes.
    """

    def __init__(self, trainer: Any, total: int, estimate: int | None, read_peak: Callable[[], int]) -> None:
        self.trainer, self.total, self.estimate, self.read_peak = trainer, total, estimate, read_peak
        self.measured: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read back, once."""
        if self.measured is not None:
            return
        self.measured = self.read_peak()
        expected = "" if self.estimate is None else f", {self.estimate / GIB:.2f} GiB expected"
        self.trainer.say(f"memory: {self.measured / GIB:.2f} GiB after the first step{expected}")
        split = self.trainer.split
        if self.measured > USABLE * self.total and split.rows > 1:
            self.trainer.split = smaller(split, split.rows, split.tokens or 0)
            self.trainer.say(
                f"memory: too near the limit of {self.total / GIB:.2f} GiB; going on with {self.trainer.split}"
            )


def cuda_probe(trainer: Any, estimate: int | None) -> MemoryProbe | None:
    """A probe of the trainer's GPU, None on a CPU."""
    device = trainer.args.device
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    return MemoryProbe(trainer, total, estimate, lambda: torch.cuda.max_memory_reserved(device))
