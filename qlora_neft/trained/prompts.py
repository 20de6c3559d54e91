"""What a model is asked, in the words it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.encode import Encoder
from ..data.examples import BadRow, Message, Piece
from ..data.templates import TEMPLATE_OF_FORMAT, make_template
from ..errors import UserInputError
from ..suffixes import JINJA_SUFFIXES

ONE_REQUEST = ("alpaca", "none")  # templates without a place for what was said before


class Prompts:
    """Turns requests into the tokens a response follows.

    Args:
        tokenizer: The adapter's own.
        name: ``alpaca``, ``vicuna``, ``chat``, ``none``, or a Jinja file.

    Attributes:
        name: The template's.
        stop_token_ids: Tokens that end a response.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        # A user's Jinja file was saved with the adapter, as its tokenizer's chat template.
        self.name = "chat" if name.endswith(JINJA_SUFFIXES) and tokenizer.chat_template else name
        format = "text" if self.name == "none" else "messages"
        self.template = make_template(self.name, format, tokenizer)
        self._encoder = Encoder(tokenizer, adds_special_tokens=self.template.adds_special_tokens)
        ends = {self.template.end, tokenizer.eos_token} - {None}
        self.stop_token_ids = tuple(sorted(tokenizer.convert_tokens_to_ids(list(ends))))

    @property
    def takes_conversations(self) -> bool:
        """Whether the template has room for more than one request."""
        return self.name not in ONE_REQUEST

    def text(self, messages: Sequence[Message]) -> str:
        """The text that the next response follows.

        Args:
            messages: A conversation that ends with a request; of one message, where the template takes no more.

        Raises:
            UserInputError: If the template has no room for the conversation.
        """
        if not self.takes_conversations and len(messages) != 1:
            raise UserInputError(
                f"the prompt template {self.name} takes one request, got {len(messages)} messages. "
                "Train with data.prompt_template: vicuna or chat for conversations."
            )
        try:
            return self.template.prompt(messages)
        except BadRow as error:
            raise UserInputError(f"the conversation {error}.") from error

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of `text`, as training had them before a response."""
        return self.ids_of_text(self.text(messages))

    def ids_of_text(self, text: str) -> list[int]:
        """Token ids of a prompt that is written out already."""
        [encoded] = self._encoder.encode([[Piece(text, False)]])
        return encoded.ids.tolist()


def template_of(recipe: dict[str, Any] | None, summary: dict[str, Any] | None, tokenizer: Any) -> str:
    """The template an adapter was trained with, by its records.

    That of the run's first source. Without records: the tokenizer's chat template if it has one, else none.
    """
    sources = ((summary or {}).get("data") or {}).get("sources") or []
    if sources and sources[0].get("prompt_template"):
        return sources[0]["prompt_template"]
    data = (recipe or {}).get("data", {})
    stated, format = data.get("prompt_template", "auto"), data.get("format", "auto")
    if stated != "auto":
        return stated
    return TEMPLATE_OF_FORMAT.get(format) or ("chat" if tokenizer.chat_template else "none")
