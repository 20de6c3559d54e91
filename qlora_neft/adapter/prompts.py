"""What a model is asked, in the words it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.encode import Encoder
from ..data.formats import BadRow, Dialogue, Example, Instruction, Message, Passage, Piece, as_dialogue
from ..data.templates import TEMPLATE_OF_FORMAT, alpaca_prompt, make_template
from ..errors import UserInputError
from ..paths import JINJA_SUFFIXES

ONE_REQUEST = ("alpaca", "none")  # templates without a place for what was said before
TEMPLATES = (*ONE_REQUEST, "vicuna", "chat")


class Prompts:
    """Turns requests into the tokens a response follows.

    Args:
        tokenizer: The adapter's own.
        name: ``alpaca``, ``vicuna``, ``chat``, ``none``, or a Jinja file.

    Attributes:
        name: The template's.
        stop_token_ids: Tokens that end a response.

    Raises:
        UserInputError: If there is no such template.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if name not in TEMPLATES and not name.endswith(JINJA_SUFFIXES):
            raise UserInputError(f"must be {', '.join(TEMPLATES)} or a .jinja file, got {name!r}.")
        self.name = name
        format = "text" if self.name == "none" else "messages"
        self.template = make_template(self.name, format, tokenizer)
        self._encoder = Encoder(tokenizer, adds_special_tokens=self.template.adds_special_tokens)
        ends = {self.template.end, tokenizer.eos_token} - {None}
        self.stop_token_ids = tuple(sorted(tokenizer.convert_tokens_to_ids(list(ends))))

    @property
    def takes_conversations(self) -> bool:
        """Whether the template has room for more than one request."""
        return self.name not in ONE_REQUEST

    def text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The text that the next response follows.

        Args:
            messages: A conversation that ends with a request; of one message, where the template takes no more.
            tools: Descriptions of the functions the model may call, for chat templates.

        Raises:
            UserInputError: If the template has no room for the conversation.
        """
        if not self.takes_conversations and [message["role"] for message in messages] != ["user"]:
            roles = ", ".join(message["role"] for message in messages[:4])
            raise UserInputError(
                f"the prompt template {self.name} takes one request, got {len(messages)} messages ({roles}). "
                "Train with data.prompt_template: vicuna or chat for conversations."
            )
        try:
            if not tools:
                return self.template.prompt(messages)
            if self.name in TEMPLATES[:-1]:
                raise UserInputError(f"the prompt template {self.name} has no place for tools; chat templates may.")
            return self.template.chat.prompt(messages, tools)
        except BadRow as error:
            raise UserInputError(f"the conversation {error}.") from error

    def ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of `text`, as training had them before a response."""
        return self._encoded(self._pieces(messages, tools))

    def ids_of_example(self, example: Example) -> list[int]:
        """Token ids of a row of data up to its last response, which is not looked at; a dialogue ends before it."""
        if isinstance(example, Dialogue):
            return self.ids(example.messages, example.tools)
        if isinstance(example, Instruction) and self.name == "alpaca":
            return self.ids_of_text(alpaca_prompt(example.instruction, example.input))
        if isinstance(example, Passage) and self.name == "none":
            return self.ids_of_text(example.prompt)
        return self.ids(as_dialogue(example).messages[:1])

    def ids_of_text(self, text: str) -> list[int]:
        """Token ids of a prompt that is written out already."""
        return self._encoded([Piece(text, False)])

    def _encoded(self, pieces: Sequence[Piece]) -> list[int]:
        [encoded] = self._encoder.encode([pieces])
        return encoded.ids.tolist()

    def _pieces(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[Piece]:
        """The text cut where training cuts it: around the responses before."""
        text = self.text(messages, tools)
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            return [Piece(text, False)]
        try:
            before = self.template.render(Dialogue(tuple(messages[: last + 1]), tuple(tools) if tools else None))
        except BadRow:  # a blank response, as an interrupted one is
            return [Piece(text, False)]
        known = "".join(piece.text for piece in before)
        rest = [Piece(text.removeprefix(known), False)]
        return [*before, *rest] if text.startswith(known) else [Piece(text, False)]


def template_of(recipe: dict[str, Any] | None, summary: dict[str, Any] | None, tokenizer: Any) -> str:
    """The template an adapter was trained with, by its records.

    That of the run's first source. Without records: the tokenizer's chat template if it has one, else none. A user's
    Jinja file was saved with the adapter, as its tokenizer's chat template.
    """
    name = recorded_template(recipe, summary) or ("chat" if tokenizer.chat_template else "none")
    return "chat" if name.endswith(JINJA_SUFFIXES) and tokenizer.chat_template else name


def recorded_template(recipe: dict[str, Any] | None, summary: dict[str, Any] | None) -> str | None:
    """The template that a run's records name, None if they name none."""
    sources = ((summary or {}).get("data") or {}).get("sources") or []
    if sources and sources[0].get("prompt_template"):
        return sources[0]["prompt_template"]
    data = (recipe or {}).get("data", {})
    stated, format = data.get("prompt_template", "auto"), data.get("format", "auto")
    if stated != "auto":
        return stated
    return TEMPLATE_OF_FORMAT.get(format)
