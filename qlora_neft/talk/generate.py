"""Answers of a trained model to a list of requests, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..base_config import check_vocabulary
from ..data.examples import Passage
from ..decoding import Continuation, Decoding, continuations
from ..errors import RunFailed, UserInputError
from ..trained import Trained
from .requests import Request
from .stream import TextStream, answer_text


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        request: What was asked.
        text: The answer; white space at its ends is left away, but without a prompt template.
        tokens: How many, the end token not counted.
        finish_reason: ``stop``, ``length``, ``no room`` or ``interrupted``, see `Continuation`.
        prompt_tokens: Tokens of the prompt.
    """

    request: Request
    text: str
    tokens: int
    finish_reason: str
    prompt_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The answer without its request, for JSON."""
        return {"text": self.text, "tokens": self.tokens, "finish_reason": self.finish_reason}


def generate(
    trained: Trained,
    requests: Sequence[Request | str],
    decoding: Decoding,
    *,
    batch_size: int = 8,
    base_alone: bool = False,
) -> list[Reply]:
    """Answer requests, see `replies`."""
    return list(replies(trained, requests, decoding, batch_size=batch_size, base_alone=base_alone))


def replies(
    trained: Trained,
    requests: Sequence[Request | str],
    decoding: Decoding,
    *,
    batch_size: int = 8,
    base_alone: bool = False,
    write: Callable[[str], Any] | None = None,
) -> Iterator[Reply]:
    """Answer requests in their order, as they come.

    Args:
        trained: The model.
        requests: What to ask; texts are put into the template of the training run.
        decoding: How tokens are chosen.
        batch_size: Requests at a time; answers do not depend on it, but for rounding.
        base_alone: Answer without the adapter.
        write: Takes each answer's text as it comes; requests are then answered one at a time.

    Raises:
        UserInputError: Before the first answer, if the template has no room for a request.
        RunFailed: If the memory does not do for the batch.
    """
    asked = [
        r if isinstance(r, Request) else Request(Passage(r, ""), f"request {n}") for n, r in enumerate(requests, 1)
    ]
    prompts = [_prompt(trained, request) for request in asked]
    size = 1 if write else batch_size
    return _answered(trained, asked, prompts, decoding, size, base_alone, write)


def _answered(
    trained: Trained,
    asked: list[Request],
    prompts: list[list[int]],
    decoding: Decoding,
    batch_size: int,
    base_alone: bool,
    write: Callable[[str], Any] | None,
) -> Iterator[Reply]:
    as_it_is = trained.prompts.name == "none"
    for start in range(0, len(asked), batch_size):
        part = prompts[start : start + batch_size]
        stream = text_stream(trained, write) if write else None
        with trained.base_alone() if base_alone else nullcontext():
            found = answer_ids(trained, part, decoding, streamer=stream, first_number=start)
        for i, answer in enumerate(found, start):
            text = answer_text(trained.tokenizer, answer.ids, as_it_is=as_it_is)
            yield Reply(asked[i], text, len(answer.ids), answer.finish_reason, len(prompts[i]))


def answer_ids(
    trained: Trained, prompts: Sequence[Sequence[int]], decoding: Decoding, **options: Any
) -> list[Continuation]:
    """Answers to one batch of prompts, in their order; ``options`` as of `continuations`."""
    check_vocabulary(trained.model.config, max(max(prompt) for prompt in prompts))
    try:
        found = continuations(
            trained.model,
            trained.tokenizer,
            prompts,
            decoding,
            batch_size=len(prompts),
            stop_token_ids=trained.stop_token_ids,
            **options,
        )
        return sorted(found, key=lambda answer: answer.index)
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            f"out of memory with {len(prompts)} prompts at a time. Give a smaller --batch-size or --max-new-tokens."
        ) from error


def text_stream(trained: Trained, write: Callable[[str], Any]) -> TextStream:
    """Hands an answer's text to ``write`` as it comes."""
    as_it_is = trained.prompts.name == "none"
    return TextStream(trained.tokenizer, write, stop_token_ids=trained.stop_token_ids, as_it_is=as_it_is)


def _prompt(trained: Trained, request: Request) -> list[int]:
    try:
        return trained.prompts.ids_of_example(request.example)
    except UserInputError as error:
        raise UserInputError(f"{request.place}: {error}") from error
