"""The micro-batch that is on its way through a model, for modules that need to know whose tokens they see."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..steps.sequences import SequenceSpan


@dataclass
class UnderWay:
    """The micro-batch under way, one object per trainer, held by every module that reads it.

    A plain object and no context variable: on CUDA, backward passes and the recomputation of checkpointed blocks run
    in threads of autograd's own, to which context variables do not reach.

    Attributes:
        spans: Its sequences, ordinals counted through the whole optimizer step; None outside a training step, or if the
            batch does not say where its sequences are.
        seed: Seed of the run.
        step: Optimizer step, 0-based.
    """

    spans: tuple[SequenceSpan, ...] | None = None
    seed: int = 0
    step: int = 0

    @contextmanager
    def of(self, spans: Sequence[SequenceSpan] | None, seed: int, step: int) -> Generator[None, None, None]:
        """Be under way with a micro-batch inside the block, forward and backward pass, and with none after it."""
        self.spans, self.seed, self.step = None if spans is None else tuple(spans), seed, step
        try:
            yield
        finally:
            self.spans = None
