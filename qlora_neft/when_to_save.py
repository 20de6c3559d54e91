"""When a checkpoint is due: by the clock, and when someone asks training to stop."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback

from .stop_request import StopRequest


class WhenToSave(TrainerCallback):
    """Asks the trainer for checkpoints; all ranks ask at the same step.

    Args:
        save_every_minutes: Longest time between two; None for none by the clock.
        stop: Answered with a checkpoint and the end of training.
    """

    def __init__(self, save_every_minutes: float | None = None, stop: StopRequest | None = None) -> None:
        self.save_every_minutes, self.stop = save_every_minutes, stop
        self._saved = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint if one is due."""
        stop, due = self._agreed(args, self._is_stopping(), self._is_due())
        if stop:
            control.should_training_stop, control.should_evaluate = True, False
        control.should_save = control.should_save or stop or due

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock anew."""
        self._saved = time.monotonic()

    def _is_stopping(self) -> bool:
        return self.stop is not None and self.stop.requested

    def _is_due(self) -> bool:
        minutes = self.save_every_minutes
        return minutes is not None and time.monotonic() - self._saved >= 60 * minutes

    def _agreed(self, args: Any, *wishes: bool) -> list[bool]:
        """Whether any rank wishes each: signals and clocks reach ranks at different steps."""
        if args.world_size == 1:
            return list(wishes)
        asked = torch.tensor(wishes, dtype=torch.int32, device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return [bool(wish) for wish in asked]
