"""When a trainer saves and stops: after a signal, by the clock, at its last step; on all ranks at the same step."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..run_folder.stop import StopRequest


class WhenToSave(TrainerCallback):
    """Asks the trainer for checkpoints. There is always one of the last step, so that what comes after may be cut off.

    Args:
        save_every_minutes: Longest time between two checkpoints; None for no checkpoints by the clock.
        stop: The request that a checkpoint and the end of training answer.
    """

    def __init__(self, save_every_minutes: float | None = None, stop: StopRequest | None = None) -> None:
        self.save_every_minutes, self.stop = save_every_minutes, stop
        self._saved = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint if one is due."""
        number, due = agreed(args, _signal_of(self.stop), self._is_due())
        if number:
            # Without an evaluation, which may outlast the grace period.
            control.should_training_stop, control.should_evaluate = True, False
            if self.stop is not None:
                self.stop.agree(number)  # otherwise a rank without a signal would take the run for finished
        # What the trainer's own schedule asked for stays.
        control.should_save = bool(control.should_save or number or due or state.global_step >= state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restart the clock."""
        self._saved = time.monotonic()

    def _is_due(self) -> bool:
        minutes = self.save_every_minutes
        return minutes is not None and time.monotonic() - self._saved >= 60 * minutes


def is_asked_to_stop(stop: StopRequest | None, args: TrainingArguments) -> bool:
    """Return whether any rank was asked to stop; every rank has to ask, as often as the others."""
    if stop is None:
        return False
    number = agreed(args, _signal_of(stop))[0]
    if number:
        stop.agree(number)
    return stop.requested


def _signal_of(stop: StopRequest | None) -> int:
    return 0 if stop is None or stop.signal is None else int(stop.signal)


def agreed(args: TrainingArguments, *wishes: int) -> list[int]:
    """Return the maximum of each wish over all ranks: signals and clocks reach ranks at different steps."""
    if args.world_size == 1:
        return list(wishes)
    # One reduction for all wishes, (wishes,): it is waited for in every step.
    asked = torch.tensor(wishes, dtype=torch.int32, device=args.device)
    torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
    return asked.tolist()
