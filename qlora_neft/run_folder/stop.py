"""When to stop and when to save: SIGINT and SIGTERM as requests that training answers between steps, and a clock."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A request to stop training, and when it was made. The first signal asks; a second one stops at once.

    Args:
        grace_seconds: Time to finish the step and write a checkpoint. A step that takes more than half of it is
            abandoned; the checkpoint is then that of the step before.
        on_request: Called once, with the signal's name.

    Attributes:
        signal: The signal that asked, None as long as none did.
    """

    def __init__(self, grace_seconds: float, on_request: Callable[[str], None] | None = None) -> None:
        self.grace_seconds, self.on_request = grace_seconds, on_request
        self.signal: signal.Signals | None = None
        self._is_heard = False  # by this process; `signal` may come from another rank
        self._since = 0.0  # of the monotonic clock, which nobody sets

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return self.signal is not None

    def overdue(self) -> bool:
        """Return whether the step has to be abandoned for the checkpoint to be written in time."""
        # The other half of the time is for the checkpoint.
        return self.requested and time.monotonic() - self._since > self.grace_seconds / 2

    def request(self, number: int) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: If it is the second one.
        """
        if self._is_heard:
            raise KeyboardInterrupt
        self._is_heard = True
        self.agree(number)
        if self.on_request:
            self.on_request(signal.Signals(number).name)

    def agree(self, number: int) -> None:
        """Stop because another process of this run was asked to. A first signal in this process is still a request."""
        if not self.requested:
            self.signal, self._since = signal.Signals(number), time.monotonic()


@contextmanager
def answered(stop: StopRequest) -> Generator[StopRequest, None, None]:
    """Direct signals to ``stop`` during a block, and restore their handlers afterwards.

    Python handles signals in its main thread only: in other threads the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.request(number)

    previous: dict[int, Any] = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class WhenToSave(TrainerCallback):
    """Asks the trainer for checkpoints, on all ranks at the same step.

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
        number, due = self._agreed(args, self._stop_signal(), self._is_due())
        if number:
            # Without an evaluation, which may outlast the grace period.
            control.should_training_stop, control.should_evaluate = True, False
            if self.stop is not None:
                self.stop.agree(number)  # otherwise a rank without a signal would take the run for finished
        # What the trainer's own schedule asked for stays.
        control.should_save = bool(control.should_save or number or due)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restart the clock."""
        self._saved = time.monotonic()

    def _stop_signal(self) -> int:
        return 0 if self.stop is None or self.stop.signal is None else int(self.stop.signal)

    def _is_due(self) -> bool:
        minutes = self.save_every_minutes
        return minutes is not None and time.monotonic() - self._saved >= 60 * minutes

    def _agreed(self, args: TrainingArguments, *wishes: int) -> list[int]:
        """Return the maximum of each wish over all ranks: signals and clocks reach ranks at different steps."""
        if args.world_size == 1:
            return list(wishes)
        # One reduction for all wishes, (wishes,): it is waited for in every step.
        asked = torch.tensor(wishes, dtype=torch.int32, device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return asked.tolist()
