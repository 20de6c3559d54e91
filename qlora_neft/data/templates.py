"""The text around a request: Alpaca's prompt, Vicuna's, the tokenizer's own, or a Jinja file.

A template turns an example into pieces of text, trained and untrained. Joined, they are what the model reads, byte for
byte as in the code the template comes from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UserInputError
from ..paths import JINJA_SUFFIXES
from .chat_markers import REASONING
from .chat_template import ChatTemplate
from .encode import added_begin
from .examples import BadRow, Dialogue, Example, Instruction, Message, Passage, Piece, Rendered, as_dialogue
from .template_date import dated, with_date

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The template of each format if the recipe says auto.
TEMPLATE_OF_FORMAT = {"alpaca": "alpaca", "sharegpt": "vicuna", "messages": "chat", "prompt-completion": "none"}

# PROMPT_DICT in train.py of github.com/tatsu-lab/stanford_alpaca; dataset.py of github.com/neelsjain/NEFTune has
# the same. The NEFTune paper uses it for every data set but ShareGPT ("Experimental Set-up"). Up to its ending:
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
)
# Published code ends the prompt in three ways, and a model answers best in the one that it was trained on.
ALPACA_ENDINGS = {
    "alpaca": "### Response:",
    # conversation.py of NEFTune's code, with which its authors ask for AlpacaEval's answers (they train on the above).
    "alpaca-newline": "### Response:\n",
    # ALPACA_PROMPT_DICT in qlora.py of github.com/artidoro/qlora, the implementation behind NEFTune's Table 3.
    "alpaca-space": "### Response: ",
}
# vicuna_v1.1 in fastchat/conversation.py of github.com/lm-sys/FastChat: roles USER and ASSISTANT, separated by a
# space; each response is followed by the end token, and nothing by that.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Template(Protocol):
    """The methods of every template."""

    @property
    def end(self) -> str | None:
        """Text of the token that ends a response, None if the template writes none."""

    @property
    def end_of_call(self) -> str | None:
        """Text of the token that ends a turn of tool calls, None if the template writes none."""

    @property
    def special(self) -> re.Pattern[str] | None:
        """Matches the special tokens of the tokenizer and those that mark turns; None for a template without such."""

    @property
    def lacks_begin(self) -> str | None:
        """The begin token, if a template file leaves it out that the tokenizer puts before a text."""

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer has to add its begin token; a chat template writes its own."""

    def render(self, example: Example) -> list[Piece]:
        """Return the example's text; raises `BadRow` if the template cannot express it."""

    @property
    def source(self) -> str:
        """The text of the template's Jinja, empty for the others."""

    def sequences(self, example: Example) -> Rendered:
        """Return what is trained of the example; raises `BadRow` if the template cannot express it."""

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text that the next response follows."""


class _OneSequence:
    """A template that makes one sequence of an example."""

    source = ""
    end_of_call: str | None = None
    lacks_begin: str | None = None
    special: re.Pattern[str] | None = None
    end: str

    def ended(self, response: str) -> str:
        """Return a response with its end token, which is not doubled where it stands in the text already."""
        said = response.rstrip()
        return said if said.endswith(self.end) else response + self.end

    def render(self, example: Example) -> list[Piece]:
        """Return the example's text."""
        raise NotImplementedError

    def sequences(self, example: Example) -> Rendered:
        """Return the example's text as the one sequence."""
        return Rendered((self.render(example),))


class NoTemplate(_OneSequence):
    """No text around a prompt and its completion, or a completion alone."""

    adds_special_tokens = True

    def __init__(self, end: str) -> None:
        self.end = end

    def render(self, example: Example) -> list[Piece]:
        """Return the text unchanged, and the end token."""
        if not isinstance(example, Passage):
            raise BadRow("is a conversation, and its text needs a template; set data.prompt_template: vicuna or chat")
        pieces = ((example.prompt, False), (self.ended(example.completion), True))
        # Plain text has no prompt.
        return [Piece(text, trained) for text, trained in pieces if text]

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the request unchanged."""
        [message] = messages
        return message["content"]


class AlpacaTemplate(_OneSequence):
    """Stanford Alpaca's prompt: one request, with or without an input, and one response.

    Args:
        end: Text of the token that ends a response.
        name: One of `ALPACA_ENDINGS`.
    """

    adds_special_tokens = True

    def __init__(self, end: str, name: str = "alpaca") -> None:
        self.end, self.name = end, name

    def render(self, example: Example) -> list[Piece]:
        """Return prompt and response."""
        if not isinstance(example, Instruction):
            example = _single_exchange(as_dialogue(example))
        prompt = alpaca_prompt(example.instruction, example.input, self.name)
        return [Piece(prompt, False), Piece(self.ended(example.output), True)]

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the prompt of one request."""
        [message] = messages
        return alpaca_prompt(message["content"], name=self.name)


class VicunaTemplate(_OneSequence):
    """Vicuna v1.1: a system line, which a system message replaces, then USER and ASSISTANT in turn."""

    adds_special_tokens = True

    def __init__(self, end: str) -> None:
        self.end = end

    def render(self, example: Example) -> list[Piece]:
        """Return system line, requests and responses."""
        dialogue = as_dialogue(example)
        if dialogue.tools:
            raise BadRow("has tools, and Vicuna's prompt has no place for them; set data.prompt_template: chat")
        system, turns = _system_and_turns(dialogue.messages)
        flags = dialogue.trained_turns[-len(turns) :]  # a system message before them has none
        pieces: list[Piece] = []
        for number, (turn, trained) in enumerate(zip(turns, flags, strict=True)):
            if turn["role"] == "user":
                start = f"{system} " if number == 0 else ""
                pieces.append(Piece(f"{start}USER: {turn['content']} ASSISTANT:", False))
            else:
                pieces.append(Piece(self.ended(f" {turn['content']}"), trained, excluded=not trained))
        return pieces

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation that ends with a request."""
        placeholder = {"role": "assistant", "content": ""}
        # The prompt is what training puts before a response, so it is taken from there.
        pieces = self.render(Dialogue((*messages, placeholder)))
        return "".join(piece.text for piece in pieces[:-1])


class JinjaTemplate:
    """The tokenizer's own chat template, or the user's."""

    adds_special_tokens = False

    def __init__(self, chat: ChatTemplate) -> None:
        self.chat, self.end, self.end_of_call = chat, chat.end_of_turn, chat.end_of_call
        self.special = chat.wording.special
        begin = None if chat.chat_template is None or chat.wording.begins else added_begin(chat.tokenizer)
        self.lacks_begin = begin
        chosen = chat.tokenizer.get_chat_template(chat.chat_template, [{}])
        self.source = f"{chat.tokenizer.get_chat_template(chat.chat_template)}{chosen}"  # they differ with tools

    def render(self, example: Example) -> list[Piece]:
        """Return the conversation as the template writes it."""
        dialogue = as_dialogue(example)
        return self.chat.render(dialogue.messages, dialogue.tools)

    def sequences(self, example: Example) -> Rendered:
        """Return the conversation as the template writes it, with a sequence for each thought that it would drop."""
        return self.chat.sequences(as_dialogue(example))

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation that ends with a request."""
        return self.chat.prompt(messages)


def make_template(
    name: str,
    format: str,
    tokenizer: PreTrainedTokenizerBase,
    now: datetime | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Template:
    """Make the template that a recipe names.

    Args:
        name: ``auto``, one of `ALPACA_ENDINGS`, ``vicuna``, ``chat``, or the path of a Jinja file.
        format: The format of the rows, which decides what ``auto`` is.
        tokenizer: A tokenizer with an end token; for ``chat``, with a chat template.
        now: The moment that a template reading today's date is to write; None for that of each rendering.
        kwargs: ``data.chat_template_kwargs``, which chat templates alone are given.

    Raises:
        UserInputError: If the file does not exist, or the template cannot be used, or never reads one of ``kwargs``.
    """
    name = resolve_template(name, format)
    if name == "chat":
        return JinjaTemplate(ChatTemplate(tokenizer if now is None else with_date(tokenizer, now), kwargs=kwargs))
    if name.endswith(JINJA_SUFFIXES):
        text = read_jinja(name)
        return JinjaTemplate(ChatTemplate(tokenizer, text if now is None else dated(text, now), name, kwargs))
    # These end a response with the tokenizer's own end token, as the code they are from does.
    if name in ALPACA_ENDINGS:
        return AlpacaTemplate(tokenizer.eos_token, name)
    return {"none": NoTemplate, "vicuna": VicunaTemplate}[name](tokenizer.eos_token)


def resolve_template(name: str, format: str) -> str:
    """Return the template that rows of a format get: ``none``, Alpaca's, ``vicuna``, ``chat`` or a file.

    Plain text has no request to put anything around. A prompt with its completion stays unchanged unless the recipe
    names a template for conversations; Alpaca's is not one, it goes around an instruction.
    """
    if format == "text" or (format == "prompt-completion" and name in ALPACA_ENDINGS):
        return "none"
    return TEMPLATE_OF_FORMAT[format] if name == "auto" else name


def read_jinja(path: str) -> str:
    """Return the text of a template file.

    Raises:
        UserInputError: If it cannot be read.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserInputError(f"data.prompt_template: {path!r} is not UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        raise UserInputError(
            f"data.prompt_template: {path!r} cannot be read ({error.strerror}). Paths are relative to the current "
            "directory."
        ) from error


def alpaca_prompt(instruction: str, input: str | None = None, name: str = "alpaca") -> str:
    """Return Alpaca's prompt, with its input section if there is an input, ended as ``name`` says."""
    before = ALPACA_WITH_INPUT if input else ALPACA_WITHOUT_INPUT
    return before.format(instruction=instruction, input=input) + ALPACA_ENDINGS[name]


def _single_exchange(dialogue: Dialogue) -> Instruction:
    roles = [message["role"] for message in dialogue.messages]
    if roles != ["user", "assistant"] or dialogue.tools:
        raise BadRow(
            f"is a conversation ({', '.join(roles[:4])}{', ...' * (len(roles) > 4)}), and Alpaca's prompt has room for "
            "one request and one response; set data.prompt_template: vicuna or chat"
        )
    request, response = dialogue.messages
    _no_thought(dialogue.messages, "Alpaca's")
    return Instruction(request["content"], "", response["content"])


def _system_and_turns(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    has_system = messages[0]["role"] == "system"
    turns = list(messages[1:] if has_system else messages)
    for number, turn in enumerate(turns):
        # FastChat asserts the same order.
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected or turn.get("tool_calls"):
            got = "tool_calls" if turn.get("tool_calls") else turn["role"]
            place = number + 1 + has_system
            raise BadRow(f"turn {place} is {got}, and Vicuna's prompt takes user and assistant in turn")
    _no_thought(messages, "Vicuna's")
    return (messages[0]["content"] if has_system else VICUNA_SYSTEM), turns


def _no_thought(messages: Sequence[Message], whose: str) -> None:
    thinking = next((number for number, message in enumerate(messages, start=1) if message.get(REASONING[0])), None)
    if thinking is not None:
        raise BadRow(
            f"message {thinking} has a thought ({REASONING[0]}), and {whose} prompt has no place for it; set "
            "data.prompt_template: chat"
        )
