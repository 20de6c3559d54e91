"""Greedy answers to held-out prompts, and how many match their reference exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..steps import IGNORE_INDEX, LOSS_WEIGHTS
from .decode import Decoding, generate_ids, text_of

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A held-out sequence up to its last response, and that response.

    Attributes:
        prompt_ids: The tokens that stand before the response in training.
        reference_ids: The response's tokens, without its end token.
        prompt: The prompt as text, without special tokens.
        reference: The response as text, without special tokens.
    """

    prompt_ids: list[int]
    reference_ids: list[int]
    prompt: str
    reference: str


@dataclass(frozen=True)
class Answer:
    """A prompt, the reference, and the model's answer."""

    prompt: str
    reference: str
    text: str

    @property
    def is_exact(self) -> bool:
        """Whether the answer is the reference, apart from white space at both ends."""
        return self.text.strip() == self.reference.strip()


def questions(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, count: int, stop_token_ids: Sequence[int]
) -> list[Question]:
    """Turn the first rows of a dataset into questions, omitting those without a prompt.

    Args:
        dataset: Rows of ``input_ids`` and ``labels``, and ``loss_weights`` if tokens have weights.
        tokenizer: Decodes them.
        count: Maximum number of rows.
        stop_token_ids: Tokens that end a response.
    """
    found = []
    for row in dataset.select(range(min(count, len(dataset)))):
        # In a conversation earlier responses are trained too; they belong to the prompt.
        begin, end = _last_response(row["labels"], row.get(LOSS_WEIGHTS))
        # An answer is compared without its end token, and a row that was cut has none.
        if row["input_ids"][end - 1] in stop_token_ids:
            end -= 1
        prompt, reference = row["input_ids"][:begin], row["input_ids"][begin:end]
        # Plain text is trained from its first token, so nothing is asked.
        if prompt:
            found.append(Question(prompt, reference, text_of(tokenizer, prompt), text_of(tokenizer, reference)))
    return found


def greedy_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_token_ids: Sequence[int] = (),
    between_batches: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Answer prompts greedily. A prompt that fills the model's context gets an empty answer.

    Args:
        model: A causal LM, with or without adapter; left in the mode it was in.
        tokenizer: The model's tokenizer.
        asked: The questions.
        max_new_tokens: Maximum number of tokens per answer.
        batch_size: Prompts per forward pass.
        stop_token_ids: Tokens that end an answer; by default the tokenizer's end token.
        between_batches: Called before each batch; it may raise, to give the rest up.
    """
    between_batches()
    decoding, prompts = Decoding(max_new_tokens), [question.prompt_ids for question in asked]
    # Answers come in the order of batches, and prompts that fill the context have none.
    texts = [""] * len(prompts)
    found = generate_ids(model, tokenizer, prompts, decoding, batch_size=batch_size, stop_token_ids=stop_token_ids)
    for number, (i, ids) in enumerate(found, 1):
        texts[i] = text_of(tokenizer, ids)
        if number % batch_size == 0:
            between_batches()
    return [Answer(q.prompt, q.reference, text) for q, text in zip(asked, texts, strict=True)]


def exact_match(answers: Sequence[Answer]) -> float:
    """Return the share of exact answers, in [0, 1]."""
    return sum(answer.is_exact for answer in answers) / len(answers)


def _last_response(labels: Sequence[int], weights: Sequence[float] | None) -> tuple[int, int]:
    """Return where the last run of trained labels begins and ends; of two weights, responses have the greater."""
    most = max(weights) if weights else 0.0
    trained = [label != IGNORE_INDEX and (not weights or weights[i] == most) for i, label in enumerate(labels)]
    end = max(i for i, is_trained in enumerate(trained) if is_trained) + 1
    begin = max((i + 1 for i in range(end) if not trained[i]), default=0)
    return begin, end
