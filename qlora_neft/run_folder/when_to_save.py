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
        number, due = self._agreed(args, self._stop_signal(), self._is_due())
        if number:
            control.should_training_stop, control.should_evaluate = True, False
            if self.stop is not None:
                self.stop.agree(number)  # else a rank that heard nothing would take the run for finished
        control.should_save = bool(control.should_save or number or due)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock anew."""
        self._saved = time.monotonic()

    def _stop_signal(self) -> int:
        return 0 if self.stop is None or self.stop.signal is None else int(self.stop.signal)

    def _is_due(self) -> bool:
        minutes = self.save_every_minutes
        return minutes is not None and time.monotonic() - self._saved >= 60 * minutes

    def _agreed(self, args: Any, *wishes: int) -> list[int]:
        """What any rank wishes of each: signals and clocks reach ranks at different steps."""
        if args.world_size == 1:
            return list(wishes)
        asked = torch.tensor(wishes, dtype=torch.int32, device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return asked.tolist()
