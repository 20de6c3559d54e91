"""A model measured at one moment of its run: clean losses and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..generation.answers import Answer, Question, exact_match, greedy_answers, questions
from ..trainer import QLoRANeftTrainer
from .build import Run

ANSWERS_SHOWN = 3
MIN_ANSWERS_FOR_A_SCORE = 20  # fewer are shown, not scored
MAX_ANSWER_TOKENS = 128
SPARE_TOKENS = 8  # beyond the longest reference, to see an answer run on


@dataclass(frozen=True)
class Measurement:
    """Losses in nats per trained token, without noise or dropout.

    Attributes:
        clean_train_loss: Loss on the first training rows.
        held_out_loss: Loss on all held-out rows, None without any.
        answers: Answers to the first held-out prompts.
    """

    clean_train_loss: float
    held_out_loss: float | None = None
    answers: list[Answer] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return the losses, and the share of exact answers if there are enough for a score."""
        found: dict[str, float] = {"clean_train_loss": self.clean_train_loss}
        if self.held_out_loss is not None:
            found["held_out_loss"] = self.held_out_loss
        # One answer of three is 33%, which says nothing.
        if len(self.answers) >= MIN_ANSWERS_FOR_A_SCORE:
            found |= {"exact_match": exact_match(self.answers), "answers": len(self.answers)}
        return found

    def log(self) -> dict[str, float]:
        """Return the losses under their names in a training log."""
        found = {"clean_loss": self.clean_train_loss, "eval_loss": self.held_out_loss}
        return {key: loss for key, loss in found.items() if loss is not None}


def measure(run: Run, trainer: QLoRANeftTrainer) -> Measurement:
    """Measure a trainer's model as it is now, without moving any random stream.

    Raises:
        EvaluationGivenUp: If the run was asked to stop meanwhile.
    """
    held_out, asked_for = run.data.eval, run.recipe.machine.eval_answers
    loss = trainer.clean_train_loss()
    assert loss is not None  # None is for rows that are not tokenized yet
    if held_out is None:
        return Measurement(loss)
    count = ANSWERS_SHOWN if asked_for == "auto" else asked_for
    asked = questions(held_out, run.tokenizer, count, run.data.stop_token_ids)
    return Measurement(loss, trainer.held_out_loss(), _answers(run, trainer, asked))


def _answers(run: Run, trainer: QLoRANeftTrainer, asked: Sequence[Question]) -> list[Answer]:
    if not asked:
        return []
    # An untrained model seldom stops by itself; without this bound it would write to the limit for each prompt.
    longest = max(len(question.reference_ids) for question in asked)
    return greedy_answers(
        trainer.model,
        run.tokenizer,
        asked,
        max_new_tokens=min(longest + SPARE_TOKENS, MAX_ANSWER_TOKENS),
        batch_size=trainer.args.per_device_eval_batch_size,
        stop_token_ids=run.data.stop_token_ids,
        between_batches=trainer.check_stop,
    )
