"""Writes ``live.jsonl`` while a trainer trains; `live` has the file itself, which is read without torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import RunInterrupted, first_line
from .live import EVALUATING, FAILED, INTERRUPTED, TRAINING, LiveFile
from .metrics import peak_memory

LEAST_SECONDS = 1.0  # between two lines of a phase: quick steps share one
EVALUATION_SECONDS = 10.0  # between the signs of life of an evaluation


class LiveRecord(TrainerCallback):
    """Write down where training is, at most once a second, and around each evaluation.

    It waits for no device: the step's loss was read before, and memory is what the allocator has counted anyway.

    Args:
        file: The run's.
        counters: Returns ``tokens`` and ``bad_steps`` so far.
    """

    def __init__(self, file: LiveFile, counters: Callable[[], dict[str, int]]) -> None:
        self.file, self.counters = file, counters

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin."""
        self._write(TRAINING, args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step, and that an evaluation follows if one does."""
        is_last = state.global_step >= state.max_steps
        if control.should_evaluate or is_last or self._seconds() >= LEAST_SECONDS:
            self._write(EVALUATING if control.should_evaluate else TRAINING, args, state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give a sign of life."""
        if self._seconds() >= EVALUATION_SECONDS:
            self._write(EVALUATING, args, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that training goes on."""
        self._write(TRAINING, args, state)

    def _seconds(self) -> float:
        return time.monotonic() - self.file.written

    def _write(self, phase: str, args: TrainingArguments, state: TrainerState) -> None:
        known = {"steps": state.max_steps, "ranks": args.world_size, **self.counters(), **peak_memory(args.device)}
        self.file.write(phase, state.global_step, **known)


@contextmanager
def told_how_it_ends(file: LiveFile) -> Generator[None, None, None]:
    """Write down why a block is left early."""
    try:
        yield
    except BaseException as error:
        is_asked = isinstance(error, RunInterrupted | KeyboardInterrupt)
        # The command with which to go on stands in the lines that follow.
        file.write(INTERRUPTED if is_asked else FAILED, note=first_line(error).removesuffix(" To go on:"))
        raise
