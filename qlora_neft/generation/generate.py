"""Answers of a trained model to a list of requests, in order, whole or as their text grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.generation.streamers import BaseStreamer

from ..adapter.load import Loaded, Trained
from ..base.config import check_vocabulary
from ..data.examples import Passage
from ..errors import RunFailed, UserInputError
from .decode import Continuation, Decoding, continuations, generate_ids, text_of
from .requests import Request

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what a decoder makes of half a character


@dataclass(frozen=True)
class Reply:
    """An answer to a request.

    Attributes:
        request: The request.
        text: The answer as text, see `answer_text`.
        tokens: Number of its tokens, the end token not counted.
        finish_reason: ``stop``, ``length``, ``no room`` or ``interrupted``, see `Continuation`.
        prompt_tokens: Number of tokens of the prompt.
    """

    request: Request
    text: str
    tokens: int
    finish_reason: str
    prompt_tokens: int

    def to_dict(self) -> dict[str, str | int]:
        """Return the answer without its request, for JSON."""
        return {"text": self.text, "tokens": self.tokens, "finish_reason": self.finish_reason}


def generate(
    trained: Trained,
    requests: Sequence[Request | str],
    decoding: Decoding,
    *,
    batch_size: int = 8,
    base_alone: bool = False,
) -> list[Reply]:
    """Answer requests and return all answers, see `replies`."""
    return list(replies(trained, requests, decoding, batch_size=batch_size, base_alone=base_alone))


def replies(
    trained: Trained,
    requests: Sequence[Request | str],
    decoding: Decoding,
    *,
    batch_size: int = 8,
    base_alone: bool = False,
    write: Callable[[str], None] | None = None,
    first: int = 0,
) -> Iterator[Reply]:
    """Answer requests in order and yield each answer as soon as its batch is done.

    Args:
        trained: The model.
        requests: The requests; a text is put into the prompt template of the training run.
        decoding: How tokens are chosen.
        batch_size: Requests per forward pass; apart from rounding, answers do not depend on it.
        base_alone: Answer without the adapter.
        write: Receives each answer's text as it grows; requests are then answered one at a time.
        first: Number of requests that are answered already, and are left out.

    Raises:
        UserInputError: Before the first answer, if a request does not fit the template.
        RunFailed: If the batch does not fit in memory.
    """
    asked = [
        r if isinstance(r, Request) else Request(Passage(r, ""), f"request {n}") for n, r in enumerate(requests, 1)
    ]
    prompts = [_prompt(trained, request) for request in asked]
    size = 1 if write else batch_size
    # A generator of its own, so that requests are checked here and not when the first answer is asked for.
    return _answered(trained, asked, prompts, decoding, size, base_alone, write, first)


def answer_ids(
    trained: Trained,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    streamer: BaseStreamer | None = None,
    should_stop: Callable[[], bool] | None = None,
    first_number: int = 0,
) -> list[Continuation]:
    """Answer prompts as one batch and return the answers in the prompts' order; arguments as of `continuations`.

    Raises:
        RunFailed: If the batch does not fit in memory.
    """
    # An adapter's folder may hold another tokenizer than the base's.
    check_vocabulary(trained.model.config, max(max(prompt) for prompt in prompts))
    try:
        found = continuations(
            trained.model,
            trained.tokenizer,
            prompts,
            decoding,
            batch_size=len(prompts),
            stop_token_ids=trained.stop_token_ids,
            streamer=streamer,
            should_stop=should_stop,
            first_number=first_number,
        )
        # `continuations` yields prompts near the end of the context last.
        return sorted(found, key=lambda answer: answer.index)
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            f"out of memory with {len(prompts)} prompts at a time. Give a smaller --batch-size or --max-new-tokens."
        ) from error


def answer_texts(
    trained: Loaded, prompts: Sequence[Sequence[int]], decoding: Decoding, *, batch_size: int
) -> Iterator[tuple[int, str]]:
    """Yield the index of each prompt and its answer, batch by batch; a prompt that fills the context gets none.

    Args:
        trained: Model and tokenizer.
        prompts: Token ids of each prompt.
        decoding: How tokens are chosen.
        batch_size: Prompts per forward pass.
    """
    tokenizer, stops = trained.tokenizer, trained.stop_token_ids
    for i, ids in generate_ids(
        trained.model, tokenizer, prompts, decoding, batch_size=batch_size, stop_token_ids=stops
    ):
        yield i, text_of(tokenizer, ids)


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, as_it_is: bool) -> str:
    """Return an answer as text, without special tokens.

    Args:
        tokenizer: The model's tokenizer.
        ids: The answer's tokens.
        as_it_is: Keep white space at both ends: without a template it belongs to the text. With one it is the
            template's, such as the space behind Vicuna's ``ASSISTANT:``.
    """
    text = text_of(tokenizer, ids)
    return text if as_it_is else text.strip()


class TextStream(BaseStreamer):
    """Passes on an answer's text while it grows; the pieces together are `answer_text`.

    Text that may still change is held back: half a character, and white space that may turn out to be the end.

    Args:
        tokenizer: The model's tokenizer.
        write: Receives the new text.
        stop_token_ids: Tokens that end an answer and are not part of it.
        as_it_is: As in `answer_text`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], None],
        *,
        stop_token_ids: Sequence[int],
        as_it_is: bool,
    ) -> None:
        self.tokenizer, self.write, self.as_it_is = tokenizer, write, as_it_is
        self.stop_token_ids = set(stop_token_ids)
        self._ids: list[int] | None = None  # None until the prompt has come
        self._written = ""

    def put(self, value: Tensor) -> None:
        """Take tokens of one sequence; transformers passes the prompt first."""
        # The prompt is not part of the answer.
        if self._ids is None:
            self._ids = []
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self.stop_token_ids]
        text = answer_text(self.tokenizer, self._ids, as_it_is=self.as_it_is)
        if not text.endswith(BROKEN):
            self._pass_on(text)

    def end(self) -> None:
        """Pass on what was held back: the answer is complete."""
        self._pass_on(answer_text(self.tokenizer, self._ids or [], as_it_is=self.as_it_is))
        self._ids, self._written = None, ""

    def _pass_on(self, text: str) -> None:
        # A decoder may rewrite the end of its text (spaces, joined characters); what is written stays written.
        if len(text) > len(self._written) and text.startswith(self._written):
            self.write(text[len(self._written) :])
            self._written = text


def text_stream(trained: Trained, write: Callable[[str], None]) -> TextStream:
    """Return a stream that passes an answer's text to ``write`` as it grows."""
    # Without a template the answer continues the prompt, white space included.
    as_it_is = trained.prompts.name == "none"
    return TextStream(trained.tokenizer, write, stop_token_ids=trained.stop_token_ids, as_it_is=as_it_is)


def _answered(
    trained: Trained,
    asked: list[Request],
    prompts: list[list[int]],
    decoding: Decoding,
    batch_size: int,
    base_alone: bool,
    write: Callable[[str], None] | None,
    first: int,
) -> Iterator[Reply]:
    as_it_is = trained.prompts.name == "none"
    for start in range(first, len(asked), batch_size):
        part = prompts[start : start + batch_size]
        # A stream takes one sequence at a time; `replies` has set the batch size to 1.
        stream = text_stream(trained, write) if write else None
        with trained.base_alone() if base_alone else nullcontext():
            found = answer_ids(trained, part, decoding, streamer=stream, first_number=start)
        for i, answer in enumerate(found, start):
            text = answer_text(trained.tokenizer, answer.ids, as_it_is=as_it_is)
            yield Reply(asked[i], text, len(answer.ids), answer.finish_reason, len(prompts[i]))


def _prompt(trained: Trained, request: Request) -> list[int]:
    try:
        return trained.prompts.ids_of_example(request.example)
    except UserInputError as error:
        raise UserInputError(f"{request.place}: {error}") from error
