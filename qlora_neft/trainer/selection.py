"""Which step's weights a run ends with, and whether it ends early: the rule, and what was judged so far. No torch.

transformers' ``EarlyStoppingCallback`` and ``load_best_model_at_end`` are not used. They judge every evaluation, also
those that a machine asks for; a checkpoint that is written before an evaluation (on a signal, at the last step) loses
what it would have decided; and the best weights are one of the checkpoints that rotate. Here the rule names the steps
that count, a checkpoint says up to which of them it was judged, and holds the best weights itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

KEEP = ("last", "best")


@dataclass(frozen=True)
class Rule:
    """What decides.

    Attributes:
        keep: ``"best"``: the result has the weights of the best judged step; ``"last"``: those of the last step.
        patience: End after so many judgements in a row without improvement; None for never.
        every: Optimizer steps between two judgements; below 1, a share of all steps.
        threshold: Nats per token by which a loss must lie below the best to count as an improvement. The best is what
            last improved by that much, so that small gains add up.
    """

    keep: str
    patience: int | None
    every: float
    threshold: float

    @property
    def decides(self) -> bool:
        """Whether anything depends on a judgement."""
        return self.keep == "best" or self.patience is not None

    @property
    def keeps_best(self) -> bool:
        """Whether the best weights have to be kept."""
        return self.keep == "best"

    def interval(self, last: int) -> int:
        """Return the optimizer steps between two judgements in a run of ``last`` steps."""
        return interval(self.every, last)

    def is_due(self, step: int, last: int) -> bool:
        """Return whether a step is judged: step 0, every so many, and the last."""
        return self.decides and (step % self.interval(last) == 0 or step >= last)


def interval(every: float, last: int) -> int:
    """Return a number of steps, given as such or as a share of ``last`` steps, at least 1."""
    # Rounded first: 0.07 of 100 steps are 7.000000000000001 in binary.
    return int(every) if every >= 1 else max(1, math.ceil(round(every * last, 6)))


@dataclass
class Judgements:
    """What was judged so far; a checkpoint holds it.

    Attributes:
        best_step: The step that improved last; None before the first judgement.
        best_loss: Its held-out loss, nats per token; None if it was not finite.
        without_improvement: Judgements since.
        judged_step: The step judged last.
        judged_loss: Its loss.
        stopped: Whether patience ran out there.
    """

    best_step: int | None = None
    best_loss: float | None = None
    without_improvement: int = 0
    judged_step: int | None = None
    judged_loss: float | None = None
    stopped: bool = False

    @classmethod
    def of(cls, content: dict[str, Any]) -> Self:
        """Make it from the content of a checkpoint."""
        return cls(**content)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def judge(self, step: int, loss: float, rule: Rule) -> bool:
        """Take in the held-out loss of a step; return whether the step is the best so far.

        A loss that is not finite is no improvement, but for the first step, which has nothing to be compared with. Of
        equal losses the earlier step is the better.
        """
        self.judged_step, self.judged_loss = step, loss if math.isfinite(loss) else None
        bar = math.inf if self.best_loss is None else self.best_loss - rule.threshold
        if self.best_step is None or loss < bar:
            self.best_step, self.best_loss, self.without_improvement = step, self.judged_loss, 0
            return True
        self.without_improvement += 1
        self.stopped = rule.patience is not None and self.without_improvement >= rule.patience
        return False


@dataclass(frozen=True)
class Selected:
    """What a run ended with.

    Attributes:
        keep: As in `Rule`.
        step: The step whose weights are the result.
        held_out_loss: Its loss when it was judged, nats per token; None if it was not finite.
        best_step: The best judged step.
        best_held_out_loss: Its loss.
        stopped_early: Whether the run ended before its last step.
        planned_steps: Steps it would have taken.
        without_improvement: Judgements since the best step.
    """

    keep: str
    step: int
    held_out_loss: float | None
    best_step: int
    best_held_out_loss: float | None
    stopped_early: bool
    planned_steps: int
    without_improvement: int

    def lines(self, last: int, threshold: float) -> list[str]:
        """Say it: why the run ended at step ``last``, and whose weights these are."""
        found = []
        if self.stopped_early:
            found.append(
                f"stopped at step {last} of {self.planned_steps}: {_times(self.without_improvement)} in a row the "
                f"held-out loss was not {threshold:g} below the best, {_loss(self.best_held_out_loss)} at step "
                f"{self.best_step} (train.early_stopping_patience)"
            )
        found.append(
            f"weights of step {self.step}, held-out loss {_loss(self.held_out_loss)} (train.keep: {self.keep})"
        )
        if self.best_step == 0:
            found.append(
                "no step was better on the held-out rows than the model before training"
                + (": the result is that model. " if self.step == 0 else ". ")
                + "Lower train.learning_rate, or look at the rows."
            )
        return found


def selected(rule: Rule, judgements: Judgements, step: int, last: int) -> Selected | None:
    """Return what a run of ``last`` steps that has taken its final one, ``step``, ends with; None without a rule."""
    if not rule.decides or judgements.best_step is None:
        return None
    kept = judgements.best_step if rule.keeps_best else step
    loss = judgements.best_loss if rule.keeps_best else judgements.judged_loss
    return Selected(
        rule.keep,
        kept,
        loss,
        judgements.best_step,
        judgements.best_loss,
        judgements.stopped and step < last,
        last,
        judgements.without_improvement,
    )


def _times(count: int) -> str:
    return "1 evaluation" if count == 1 else f"{count} evaluations"


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
