"""What a model can do at one moment of a run: clean losses and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..generation.answers import Answer, Question, exact_match, greedy_answers, questions
from ..trainer import QLoRANeftTrainer

ANSWERS_SHOWN = 3
MIN_ANSWERS_FOR_A_SCORE = 20  # fewer are shown, not scored
MAX_ANSWER_TOKENS = 128
SPARE_TOKENS = 8  # beyond the longest reference, so that an answer that runs on is seen to


@dataclass(frozen=True)
class Measurement:
    """Losses in nats per trained token, without noise or dropout.

    Attributes:
        clean_train_loss: On the first training rows.
        held_out_loss: On all held-out rows, None without any.
        answers: To the first held-out prompts.
    """

    clean_train_loss: float
    held_out_loss: float | None = None
    answers: list[Answer] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Losses, and the share of exact answers where there are enough for a score."""
        found: dict[str, Any] = {"clean_train_loss": self.clean_train_loss}
        if self.held_out_loss is not None:
            found["held_out_loss"] = self.held_out_loss
        if len(self.answers) >= MIN_ANSWERS_FOR_A_SCORE:
            found |= {"exact_match": exact_match(self.answers), "answers": len(self.answers)}
        return found

    def log(self) -> dict[str, float]:
        """The losses under the names that a training log has for them."""
        found = {"clean_loss": self.clean_train_loss, "eval_loss": self.held_out_loss}
        return {key: loss for key, loss in found.items() if loss is not None}


def measure(
    trainer: QLoRANeftTrainer,
    tokenizer: Any,
    held_out: Any | None,
    num_answers: int | str = "auto",
    stop_token_ids: Sequence[int] = (),
) -> Measurement:
    """Measure a trainer's model as it is now; no random stream is moved.

    Args:
        trainer: With an evaluation set if there are held-out rows.
        tokenizer: Its tokenizer.
        held_out: Held-out sequences, a dataset of ``input_ids`` and ``labels``; None without any.
        num_answers: How many of them to answer; ``"auto"`` for a few to look at.
        stop_token_ids: Tokens that end an answer.
    """
    loss = trainer.clean_train_loss()
    if held_out is None:
        return Measurement(loss)
    count = ANSWERS_SHOWN if num_answers == "auto" else int(num_answers)
    asked = questions(held_out, tokenizer, count, stop_token_ids)
    return Measurement(loss, trainer.held_out_loss(), _answers(trainer, tokenizer, asked, stop_token_ids))


def _answers(
    trainer: QLoRANeftTrainer, tokenizer: Any, asked: Sequence[Question], stop_token_ids: Sequence[int]
) -> list[Answer]:
    if not asked:
        return []
    longest = max(len(question.reference_ids) for question in asked)
    return greedy_answers(
        trainer.model,
        tokenizer,
        asked,
        max_new_tokens=min(longest + SPARE_TOKENS, MAX_ANSWER_TOKENS),
        batch_size=trainer.args.per_device_eval_batch_size,
        stop_token_ids=stop_token_ids,
    )
