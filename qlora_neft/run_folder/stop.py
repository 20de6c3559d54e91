"""SIGINT and SIGTERM as a request that training can answer when it suits; the second one is an order."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether someone asked training to stop, and since when.

    Args:
        grace_seconds: Time to finish the step and to write a checkpoint. A step that takes more than half of it is
            given up; the checkpoint is then of the step before.
        on_request: Told the signal, once.
    """

    def __init__(self, grace_seconds: float, on_request: Callable[[str], None] | None = None) -> None:
        self.grace_seconds, self.on_request = grace_seconds, on_request
        self.signal: signal.Signals | None = None
        self._is_heard = False
        self._since = 0.0

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return self.signal is not None

    def overdue(self) -> bool:
        """Whether the step has to be given up for the checkpoint to be written in time."""
        return self.requested and time.monotonic() - self._since > self.grace_seconds / 2

    def request(self, number: int) -> None:
        """Ask; asked a second time, stop at once.

        Raises:
            KeyboardInterrupt: The second time.
        """
        if self._is_heard:
            raise KeyboardInterrupt
        self._is_heard = True
        self.agree(number)
        if self.on_request:
            self.on_request(signal.Signals(number).name)

    def agree(self, number: int) -> None:
        """Stop because another process of this run was asked to; the first signal here is then no order yet."""
        if not self.requested:
            self.signal, self._since = signal.Signals(number), time.monotonic()


@contextmanager
def answered(stop: StopRequest) -> Iterator[StopRequest]:
    """Let signals ask ``stop`` for the time of a block; afterwards they do what they did before.

    Python hears signals in its main thread only: elsewhere the block runs as it is.
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
