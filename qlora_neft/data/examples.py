"""What a row means, whatever its format: an instruction, a dialogue, or text that comes ready."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]


class BadRow(ValueError):
    """A row that cannot be an example. The message says why, without naming the row."""


class EmptyRow(BadRow):
    """A row in which there is nothing to learn: no text, or no response."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a sequence's text.

    Attributes:
        text: As the model reads it, end tokens spelled out.
        trained: Whether the loss is on it.
    """

    text: str
    trained: bool


@dataclass(frozen=True)
class Instruction:
    """A request, what it is about (may be empty), and the response."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Dialogue:
    """Messages with ``role`` and ``content``, in order, as OpenAI spells them; the loss is on the assistant's.

    Attributes:
        messages: At least one.
        tools: Descriptions of the functions the assistant may call, None without any.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Passage:
    """Text that comes ready: no template is put around it. The loss is on ``completion``."""

    prompt: str
    completion: str


Example = Instruction | Dialogue | Passage


def content_hash(example: Example) -> bytes:
    """16 bytes of SHA-256 over what an example says, whatever template is put around it later."""
    if isinstance(example, Dialogue):
        said: Any = [[dict(message) for message in example.messages], list(example.tools or ())]
    elif isinstance(example, Instruction):
        said = [example.instruction, example.input, example.output]
    else:
        said = [example.prompt, example.completion]
    text = json.dumps(said, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).digest()[:16]


def as_dialogue(example: Example) -> Dialogue:
    """One exchange as messages; an instruction's input follows it on a line of its own."""
    if isinstance(example, Dialogue):
        return example
    if isinstance(example, Passage):
        request, response = example.prompt.strip(), example.completion.strip()  # spaces for the joint, not of the turn
    else:
        request = f"{example.instruction}\n{example.input}" if example.input else example.instruction
        response = example.output
    return Dialogue(({"role": "user", "content": request}, {"role": "assistant", "content": response}))
