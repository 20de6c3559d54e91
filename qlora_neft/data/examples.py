"""What a row states: an instruction, a dialogue or a passage; and the pieces of text it becomes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

Message = Mapping[str, Any]


class BadRow(ValueError):
    """A row that is not an example. The message says why, without naming the row."""


class EmptyRow(BadRow):
    """A row with nothing to learn in it: no text, or no response."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a sequence's text.

    Attributes:
        text: The text as the model reads it, with end tokens spelled out.
        trained: Whether the loss is taken on it.
        whole_from: Number of characters before which the piece must not be ended: a thought cut short is no answer, nor
            is half a call.
        excluded: Whether it is a response that its row takes the loss off (``weight: 0``): not prompt either, so that
            no ``data.prompt_loss_weight`` trains it. A template keeps it apart from the pieces around it.
    """

    text: str
    trained: bool
    whole_from: int = 0
    excluded: bool = False


@dataclass(frozen=True)
class Rendered:
    """What a template makes of an example.

    Attributes:
        sequences: The texts to train on, each in pieces; more than one if no single text shows all that is trained.
        left_out: What of the example none of them shows, in words; empty if nothing.
        marks: Kinds of findings, see `gate.SUSPICIOUS`.
    """

    sequences: tuple[list[Piece], ...]
    left_out: str = ""
    marks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Instruction:
    """A request, its input (may be empty), and the response."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Dialogue:
    """Messages with ``role`` and ``content``, as OpenAI spells them; the loss is taken on the assistant's.

    Attributes:
        messages: The messages in order, at least one.
        tools: Descriptions of the functions the assistant may call, None without any.
        trained: Whether the loss is taken on each message, one flag a message, as the row says it; None if it says
            nothing: on every assistant message. Read through `trained_turns`.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    trained: tuple[bool, ...] | None = None

    @property
    def trained_turns(self) -> tuple[bool, ...]:
        """Whether the loss is taken on each message: an assistant's whose flag, if there are any, is true."""
        flags = self.trained or (True,) * len(self.messages)
        return tuple(
            flag and message["role"] == "assistant" for flag, message in zip(flags, self.messages, strict=True)
        )


@dataclass(frozen=True)
class Passage:
    """Text without a template around it; the loss is taken on ``completion``."""

    prompt: str
    completion: str


Example = Instruction | Dialogue | Passage


# default: values that JSON has no form for, such as the dates in a Parquet file.
_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True, default=str)
# What templates write of a message. Ids, timestamps and notes beside them make no other row.
SAID_KEYS = ("role", "content", "name", "reasoning_content", "reasoning", "thinking")


def content_hash(example: Example) -> bytes:
    """Return 16 bytes of SHA-256 over what an example says, which no template changes."""
    if isinstance(example, Dialogue):
        said: Any = [[_said(message) for message in example.messages], list(example.tools or ())]
    elif isinstance(example, Instruction):
        said = [example.instruction, example.input, example.output]
    else:
        said = [example.prompt, example.completion]
    return _sha256(_JSON.encode(said))


def prompt_hash(example: Example) -> bytes | None:
    """Return 16 bytes over the request that an example begins with, None if it has none.

    Requests that differ in case or white space alone are one.
    """
    if isinstance(example, Dialogue):
        opening = takewhile(lambda message: message["role"] != "assistant", example.messages)
        # A system message alone asks nothing.
        asked = [str(message.get("content")) for message in opening if message["role"] == "user"]
    elif isinstance(example, Instruction):
        asked = [example.instruction, example.input]
    else:
        asked = [example.prompt]
    said = " ".join(" ".join(asked).casefold().split())
    return _sha256(said) if said else None


def _said(message: Message) -> dict[str, Any]:
    said = {key: message[key] for key in SAID_KEYS if key in message}
    if message.get("tool_calls"):
        # Without their ids, which are new in every recording.
        said["tool_calls"] = [
            call.get("function", call) if isinstance(call, Mapping) else call for call in message["tool_calls"]
        ]
    return said


def _sha256(text: str) -> bytes:
    # 128 bits tell any number of rows apart, and one hash is held in memory for every row.
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16]


def as_dialogue(example: Example) -> Dialogue:
    """Return an example as messages; an instruction's input follows it on a line of its own."""
    if isinstance(example, Dialogue):
        return example
    if isinstance(example, Passage):
        # White space joins the two and is of neither turn.
        request, response = example.prompt.strip(), example.completion.strip()
    else:
        request = f"{example.instruction}\n{example.input}" if example.input else example.instruction
        response = example.output
    return Dialogue(({"role": "user", "content": request}, {"role": "assistant", "content": response}))
