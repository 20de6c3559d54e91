"""The micro-batch that is on its way through a model, for modules that need to know whose tokens they see."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..steps.sequences import SequenceSpan
from .masks import Places, forget_last_mask


@dataclass
class UnderWay:
    """The micro-batch under way, one object per trainer, held by every module that reads it.

    A plain object and no context variable: on CUDA, backward passes and the recomputation of checkpointed blocks run
    in threads of autograd's own, to which context variables do not reach.

    Attributes:
        is_active: Whether a micro-batch is under way at all; False outside a training step.
        spans: Its sequences, ordinals counted through the whole optimizer step; None outside a training step, or if the
            batch does not say where its sequences are.
        places: The same for every token of the micro-batch, flattened; None where ``spans`` is.
        seed: Seed of the run.
        step: Optimizer step, 0-based.
        passes: Training steps begun so far. While it stays the same, no weight changes: what is made of the adapters'
            weights can be kept. Optimizers may write weights without raising their version counter.
        at_end: Called when the micro-batch has passed, whatever ended it.
    """

    is_active: bool = False
    spans: tuple[SequenceSpan, ...] | None = None
    places: Places | None = None
    seed: int = 0
    step: int = 0
    passes: int = 0
    at_end: list[Callable[[], None]] = field(default_factory=list)

    @contextmanager
    def of(
        self, spans: Sequence[SequenceSpan] | None, shape: Sequence[int], seed: int, step: int
    ) -> Generator[None, None, None]:
        """Be under way with a micro-batch inside the block, forward and backward pass, and with none after it.

        Args:
            spans: Its sequences.
            shape: (B, T) of its token ids.
            seed: Seed of the run.
            step: Optimizer step, 0-based.
        """
        self.is_active = True
        self.spans, self.seed, self.step = None if spans is None else tuple(spans), seed, step
        self.places = None if self.spans is None else Places.of(self.spans, shape, seed, step)
        try:
            yield
        finally:
            self.is_active, self.spans, self.places = False, None, None
            forget_last_mask()
            for end in self.at_end:
                end()
