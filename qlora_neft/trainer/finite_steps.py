"""A trainer that skips steps whose loss or gradient is not finite, counts them, and ends a run that has diverged."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import RunFailed
from .checkpointed_trainer import CheckpointedTrainer

ROWS_NAMED = 16  # rows of a bad step that are named


class FiniteStepsTrainer(CheckpointedTrainer):
    """No gradient that is not finite reaches the optimizer.

    Attributes:
        bad_steps: Steps skipped, in all.
        say: Told every decision, one line each.
    """

    bad_steps = 0
    say: Callable[[str], None] = staticmethod(logging.getLogger(__name__).warning)
    _bad_in_a_row = 0
    _loss_is_finite = True

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Upstream's norm; a step whose loss or gradient is not finite loses its gradient here, and is skipped.

        Under fp16 a gradient that overflows is the scaler's business, as long as the loss is finite: it skips the
        step by itself and lowers its scale.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self._loss_is_finite and (self.args.fp16 or math.isfinite(float(norm))):
            self._bad_in_a_row = 0
            return norm
        self.bad_steps += 1
        self._bad_in_a_row += 1
        what = "gradient" if self._loss_is_finite else "loss"
        self.say(f"step {self.state.global_step + 1}: the {what} is not finite; the step is skipped")
        model.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
        if self._bad_in_a_row >= self.args.max_bad_steps:
            raise RunFailed(self._diverged(what))
        return norm

    def _diverged(self, what: str) -> str:
        rows = self.rows_of_step(self.state.global_step)
        named = ", ".join(map(str, rows[:ROWS_NAMED])) + ", ..." * (len(rows) > ROWS_NAMED)
        return (
            f"the {what} was not finite in {self._bad_in_a_row} steps in a row, the last being step "
            f"{self.state.global_step + 1} (rows {named} of the training data). Look at these rows, lower "
            "train.learning_rate, or set machine.precision=fp32."
        )

    def rows_of_step(self, step: int) -> list[Any]:
        """The rows of the source that a step takes, where that is known; nothing is known here."""
        return []
