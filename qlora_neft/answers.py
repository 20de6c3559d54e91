"""Greedy answers to held-out prompts, and how many match their reference exactly."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .randomness import preserved_rng
from .step_batch import IGNORE_INDEX


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
    was_training = model.training
    stops = list(stop_token_ids) or [tokenizer.eos_token_id]
    rows = [question.prompt_ids for question in asked]
    texts = [""] * len(rows)
    model.eval()
    try:
        with torch.no_grad(), preserved_rng():
            for part, num_tokens in _batches([len(row) for row in rows], _context(model), max_new_tokens, batch_size):
                found = _answer_batch(model, tokenizer, [rows[i] for i in part], num_tokens, stops)
                for i, text in zip(part, found, strict=True):
                    texts[i] = text
    finally:
        model.train(was_training)
    return [Answer(q.prompt, q.reference, text) for q, text in zip(asked, texts, strict=True)]


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of answers that are exact, in [0, 1]."""
    return sum(answer.is_exact for answer in answers) / len(answers)


def _batches(lengths: list[int], context: int, wanted: int, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Which prompts to answer together, and in how many tokens at most.

    A prompt near the end of the context is answered alone, in what room it has, so that it shortens no other answer;
    one that fills the context gets none.
    """
    roomy = [i for i, length in enumerate(lengths) if length + wanted <= context]
    for start in range(0, len(roomy), batch_size):
        yield roomy[start : start + batch_size], wanted
    for i, length in enumerate(lengths):
        if length < context < length + wanted:
            yield [i], context - length


def _context(model: Any) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _answer_batch(
    model: Any, tokenizer: Any, rows: list[list[int]], max_new_tokens: int, stop_token_ids: list[int]
) -> list[str]:
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)  # (B, T)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=stop_token_ids,
    )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
