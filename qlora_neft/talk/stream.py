"""An answer's text, whole or as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

BROKEN = "\ufffd"  # what a decoder makes of half a character


def answer_text(tokenizer: Any, ids: Sequence[int], *, as_it_is: bool) -> str:
    """Text of an answer, special tokens left away.

    Args:
        tokenizer: The model's.
        ids: The answer's tokens.
        as_it_is: Keep white space at its ends: without a template it belongs to the text. Elsewhere it is the
            template's, such as the space behind Vicuna's ``ASSISTANT:``.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text if as_it_is else text.strip()


class TextStream(BaseStreamer):
    """Hands on an answer's text while it grows; all of it together is `answer_text`.

    What may still change is held back: half a character, and white space that may turn out to be the end.

    Args:
        tokenizer: The model's.
        write: Takes the new text.
        stop_token_ids: Tokens that end an answer and are no part of it.
        as_it_is: As in `answer_text`.
    """

    def __init__(
        self, tokenizer: Any, write: Callable[[str], Any], *, stop_token_ids: Sequence[int], as_it_is: bool
    ) -> None:
        self.tokenizer, self.write, self.as_it_is = tokenizer, write, as_it_is
        self.stop_token_ids = set(stop_token_ids)
        self._ids: list[int] | None = None
        self._written = ""

    def put(self, value: Tensor) -> None:
        """Take tokens of one sequence; the first are the prompt."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self.stop_token_ids]
        text = answer_text(self.tokenizer, self._ids, as_it_is=self.as_it_is)
        if not text.endswith(BROKEN):
            self._hand_on(text)

    def end(self) -> None:
        """The answer is whole."""
        self._hand_on(answer_text(self.tokenizer, self._ids or [], as_it_is=self.as_it_is))
        self._ids, self._written = None, ""

    def _hand_on(self, text: str) -> None:
        if len(text) > len(self._written) and text.startswith(self._written):
            self.write(text[len(self._written) :])
            self._written = text
