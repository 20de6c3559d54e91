"""Requests as token ids, in the prompt template that a model was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ..data.encode import Encoder
from ..data.examples import BadRow, Dialogue, Example, Instruction, Message, Passage, Piece, as_dialogue
from ..data.templates import ALPACA_ENDINGS, TEMPLATE_OF_FORMAT, JinjaTemplate, alpaca_prompt, make_template
from ..errors import UserInputError
from ..paths import JINJA_SUFFIXES
from .folder import AdapterFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONE_REQUEST = (*ALPACA_ENDINGS, "none")  # templates without a place for earlier turns
TEMPLATES = (*ONE_REQUEST, "vicuna", "chat")
SYSTEM_ROLES = ("system", "developer")  # developer: OpenAI's newer name for the same


class Prompts:
    """Turns requests into the tokens a response follows.

    Args:
        tokenizer: The adapter's own tokenizer.
        name: Prompt template: ``alpaca`` (``-newline``, ``-space``), ``vicuna``, ``chat``, ``none``, or a Jinja file.
        kwargs: ``data.chat_template_kwargs`` of the training; chat templates alone are given them.
        system: ``data.system_prompt`` of the training, which rows without a system message were given.

    Attributes:
        name: Name of the template.
        kwargs: What a chat template is given.
        system: System message of requests that have none of their own; None for none, and where the template has no
            place for it. `text` and `ids` are given whole conversations, and add nothing.
        template: The template.
        stop_token_ids: Tokens that end a response, sorted.

    Raises:
        UserInputError: If there is no such template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        kwargs: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        if name not in TEMPLATES and not name.endswith(JINJA_SUFFIXES):
            raise UserInputError(f"must be {', '.join(TEMPLATES)} or a .jinja file, got {name!r}.")
        self.name, self.kwargs = name, dict(kwargs or {})
        self.system = system if self.takes_conversations else None
        format = "text" if self.name == "none" else "messages"
        self.template = make_template(self.name, format, tokenizer, kwargs=self.kwargs)
        self._encoder = Encoder(tokenizer, adds_special_tokens=self.template.adds_special_tokens)
        # A template may end a response otherwise than the tokenizer ends a text.
        found = (self.template.end, self.template.end_of_call, tokenizer.eos_token)
        ends = {end for end in found if end is not None}
        self.stop_token_ids = tuple(sorted(cast("list[int]", tokenizer.convert_tokens_to_ids(list(ends)))))

    @property
    def takes_conversations(self) -> bool:
        """Whether the template has a place for more than one request."""
        return self.name not in ONE_REQUEST

    def text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Return the text that the next response follows.

        Args:
            messages: A conversation that ends with a request; a single message if the template takes one request.
            tools: Descriptions of the functions the model may call, for chat templates.

        Raises:
            UserInputError: If the template has no place for the conversation or its tools.
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
            if not isinstance(self.template, JinjaTemplate):
                raise UserInputError(f"the prompt template {self.name} has no place for tools; chat templates may.")
            return self.template.chat.prompt(messages, tools)
        except BadRow as error:
            said = str(error)  # continues a sentence about the conversation, or is one about the template
            subject = "" if said.startswith("the chat template") else "the conversation "
            raise UserInputError(f"{subject}{said}.") from error

    def ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Return the token ids of `text`, as they stand before a response in training."""
        return self._encoded(self._pieces(messages, tools))

    def ids_of_example(self, example: Example) -> list[int]:
        """Return the token ids of a row of data without its response; a dialogue ends with a request."""
        if isinstance(example, Dialogue):
            return self.ids(self.with_system(example.messages), example.tools)
        if isinstance(example, Instruction) and self.name in ALPACA_ENDINGS:
            return self.ids_of_text(alpaca_prompt(example.instruction, example.input, self.name))
        if isinstance(example, Passage) and self.name == "none":
            return self.ids_of_text(example.prompt)
        # A row of one request and its response: only the request is asked.
        return self.ids(self.with_system(as_dialogue(example).messages[:1]))

    def with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return a conversation with the training's system message, unless it has its own: as training reads rows."""
        if self.system is None or messages[0]["role"] in SYSTEM_ROLES:
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def ids_of_text(self, text: str) -> list[int]:
        """Return the token ids of a prompt that is already in its template."""
        return self._encoded([Piece(text, False)])

    def _encoded(self, pieces: Sequence[Piece]) -> list[int]:
        return self._encoder.prompt_ids(pieces)

    def _pieces(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[Piece]:
        """Cut the text where training cuts it, around earlier responses: tokens never cross these cuts."""
        text = self.text(messages, tools)
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            return [Piece(text, False)]
        try:
            before = self.template.render(Dialogue(tuple(messages[: last + 1]), tuple(tools) if tools else None))
        except BadRow:  # a blank response, as after an interruption
            return [Piece(text, False)]
        # A template may render a turn otherwise once another follows it; then training's cuts do not apply.
        known = "".join(piece.text for piece in before)
        rest = [Piece(text.removeprefix(known), False)]
        return [*before, *rest] if text.startswith(known) else [Piece(text, False)]


def prompts_of(
    folder: AdapterFolder, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None = None
) -> Prompts:
    """Return the prompts an adapter was trained with, by its records, or those of another template."""
    name = prompt_template or template_of(folder, tokenizer)
    if folder.recipe is None:
        return Prompts(tokenizer, name)
    data = folder.recipe.data
    return Prompts(tokenizer, name, data.chat_template_kwargs, data.system_prompt)


def template_of(folder: AdapterFolder, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt template an adapter was trained with, by its records.

    Without records it is the tokenizer's chat template if there is one, else ``none``. A Jinja file of the user's was
    saved with the adapter as its tokenizer's chat template, so it is found as ``chat``.
    """
    name = recorded_template(folder) or ("chat" if tokenizer.chat_template else "none")
    return "chat" if name.endswith(JINJA_SUFFIXES) and tokenizer.chat_template else name


def recorded_template(folder: AdapterFolder) -> str | None:
    """Return the template that a run's records name for its first source, None if they name none."""
    data = folder.data
    if data and data.sources and data.sources[0].prompt_template:
        return data.sources[0].prompt_template
    if folder.recipe is None:
        return None
    stated = folder.recipe.data.prompt_template
    return TEMPLATE_OF_FORMAT.get(folder.recipe.data.format) if stated == "auto" else stated
