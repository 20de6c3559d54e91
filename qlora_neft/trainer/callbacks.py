"""What a trainer does at the beginning of a session and at its logs, beside the step itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer


class Speaker(Protocol):
    """The part of a trainer that `SaidOnce` reads."""

    say: Callable[[str], None]


class SaidOnce(TrainerCallback):
    """Say a line when training begins.

    Args:
        trainer: Its ``say`` is looked up then, since a run sets it after the trainer is made.
        line: The line.
    """

    def __init__(self, trainer: Speaker, line: str) -> None:
        self.trainer, self.line = trainer, line

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say it."""
        self.trainer.say(self.line)


class CleanLossDue(TrainerCallback):
    """Whether a log is the first of its session, or the first since a multiple of so many steps.

    Args:
        every: Optimizer steps; 0 for never.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._next = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a session."""
        self._next = 0

    def __call__(self, step: int) -> bool:
        """Whether the clean loss is due in the log of ``step``; asked once per log."""
        if not self.every or step < self._next:
            return False
        # The next multiple, not `every` further on: logs that fall between multiples must not shift the rhythm.
        self._next = (step // self.every + 1) * self.every
        return True


class CheckpointSomeBlocks(TrainerCallback):
    """Keep activation checkpointing on for the first ``num_blocks`` decoder blocks only.

    Args:
        num_blocks: Blocks that recompute their activations in the backward pass, at least 1.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch it off again for the other blocks: upstream has just switched it on for every one."""
        blocks = [module for module in kwargs["model"].modules() if isinstance(module, GradientCheckpointingLayer)]
        for block in blocks[self.num_blocks :]:
            block.gradient_checkpointing = False
