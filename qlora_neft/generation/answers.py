"""Greedy answers to held-out prompts, and how many match their reference exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..steps.sequences import IGNORE_INDEX
from .decode import Decoding, generate_ids


@dataclass(frozen=True)
class Question:
    """A held-out sequence up to its last response, and that response.

    Attributes:
        prompt_ids: Exactly the tokens that training would have had before the response.
        reference_ids: The response's tokens, its end token left away.
        prompt, reference: Both as text, special tokens left away.
    """

    prompt_ids: list[int]
    reference_ids: list[int]
    prompt: str
    reference: str


@dataclass(frozen=True)
class Answer:
    """One prompt, what was wanted, and what the model said."""

    prompt: str
    reference: str
    text: str

    @property
    def is_exact(self) -> bool:
        """Equal to the reference, but for white space at the ends."""
        return self.text.strip() == self.reference.strip()


def questions(dataset: Any, tokenizer: Any, count: int, stop_token_ids: Sequence[int]) -> list[Question]:
    """The first sequences of a dataset as questions; those without a prompt are left out.

    Args:
        dataset: Rows of ``input_ids`` and ``labels``.
        tokenizer: To spell them with.
        count: How many at most.
        stop_token_ids: Tokens that end a response.
    """
    found = []
    for row in dataset.select(range(min(count, len(dataset)))):
        begin, end = _last_response(row["labels"])
        if row["input_ids"][end - 1] in stop_token_ids:
            end -= 1
        prompt, reference = row["input_ids"][:begin], row["input_ids"][begin:end]
        if prompt:
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, reference)]
            found.append(Question(prompt, reference, *texts))
    return found


def _last_response(labels: Sequence[int]) -> tuple[int, int]:
    end = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1
    begin = max((i + 1 for i in range(end) if labels[i] == IGNORE_INDEX), default=0)
    return begin, end


def greedy_answers(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_token_ids: Sequence[int] = (),
) -> list[Answer]:
    """Answer prompts greedily, padded on the left; the model is left in the mode it was in.

    Args:
        model: A causal LM, with or without adapter.
        tokenizer: Its tokenizer.
        asked: Questions.
        max_new_tokens: Tokens per answer at most.
        batch_size: Prompts at a time.
        stop_token_ids: Tokens that end an answer; the tokenizer's end token without any.
    """
    decoding, prompts = Decoding(max_new_tokens), [question.prompt_ids for question in asked]
    texts = [""] * len(prompts)
    found = generate_ids(model, tokenizer, prompts, decoding, batch_size=batch_size, stop_token_ids=stop_token_ids)
    for i, ids in found:
        texts[i] = tokenizer.decode(ids, skip_special_tokens=True)
    return [Answer(q.prompt, q.reference, text) for q, text in zip(asked, texts, strict=True)]


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of answers that are exact, in [0, 1]."""
    return sum(answer.is_exact for answer in answers) / len(answers)
