"""The formats that rows come in, and the example that a row of each format states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserInputError

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
    """

    text: str
    trained: bool
    whole_from: int = 0


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


def content_hash(example: Example) -> bytes:
    """Return 16 bytes of SHA-256 over an example's content, which no template changes."""
    if isinstance(example, Dialogue):
        said: Any = [[dict(message) for message in example.messages], list(example.tools or ())]
    elif isinstance(example, Instruction):
        said = [example.instruction, example.input, example.output]
    else:
        said = [example.prompt, example.completion]
    # default: values that JSON has no form for, such as the dates in a Parquet file.
    text = json.dumps(said, sort_keys=True, ensure_ascii=True, default=str)
    # 128 bits tell any number of rows apart, and one hash is held in memory for every row.
    return hashlib.sha256(text.encode()).digest()[:16]


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


# Columns of each format. A source has the first format whose columns are all there.
REQUIRED_COLUMNS = {
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
# Names of speakers in shared conversations, as published data sets spell them.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
COLUMNS_NAMED, LONGEST_NAME = 20, 40  # in messages
MESSAGE_ROLES = ("system", "developer", "user", "assistant", "tool")


def detect_format(rows: Sequence[Mapping[str, Any]], key: str = "data.path", path: str | None = None) -> str:
    """Return the format that fits the columns of some rows.

    Args:
        rows: Rows of one source.
        key: The name the caller wrote for the source, for messages.
        path: Where the rows are from, for messages.

    Raises:
        UserInputError: If none fits.
    """
    # Of all the rows looked at: in JSON, a row may omit what another one has.
    columns = {str(name) for row in rows for name in row}
    for name, required in REQUIRED_COLUMNS.items():
        if columns >= set(required):
            # Some data sets have OpenAI's messages in ShareGPT's column.
            return "messages" if name == "sharegpt" and _speaks_openai(rows) else name
    forms = "; ".join(f"{name} needs {' and '.join(required)}" for name, required in REQUIRED_COLUMNS.items())
    where = "" if path is None else f" in {path!r}"
    raise UserInputError(f"{key}: the columns {_listed(columns)} fit no format: {forms}. Rename them{where}.")


def check_columns(rows: Sequence[Mapping[str, Any]], format: str, key: str = "data.path") -> None:
    """Check that the columns of a stated format are there.

    Raises:
        UserInputError: If one is missing from all rows.
    """
    columns = {str(name) for row in rows for name in row}
    required = REQUIRED_COLUMNS[format]
    if format == "messages" and "conversations" in columns:  # as `detect_format` allows
        return
    if not columns >= set(required):
        raise UserInputError(
            f"data.format: {format} needs the columns {' and '.join(required)}, {key} has "
            f"{_listed(columns)}. Rename them, or set data.format to what they are."
        )


def to_example(row: Mapping[str, Any], format: str) -> tuple[Example, int]:
    """Read one row.

    Args:
        row: Values by column name.
        format: One of `REQUIRED_COLUMNS`.

    Returns:
        The example, and how many turns were left out: those before the first request of a shared conversation (as
        in FastChat's training code), and those after the last response.

    Raises:
        BadRow: If the row does not fit the format.
        EmptyRow: If there is nothing to learn in it.
    """
    return _READERS[format](row)


def _instruction(row: Mapping[str, Any]) -> tuple[Example, int]:
    # Missing or null means no input, as an empty text does.
    given = "" if row.get("input") is None else row["input"]
    example = Instruction(
        _text(row.get("instruction"), "instruction"), _text(given, "input"), _text(row.get("output"), "output")
    )
    if not (example.instruction + example.input).strip():
        raise EmptyRow("instruction and input are blank")
    if not example.output.strip():
        raise EmptyRow("output is blank")
    return example, 0


def _prompt_completion(row: Mapping[str, Any]) -> tuple[Example, int]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational form
        # TRL does not train a prompt's responses, and a `Dialogue` trains them all: refuse rather than guess.
        if any(isinstance(m, Mapping) and m.get("role") == "assistant" for m in prompt):
            raise BadRow("prompt holds an assistant's message; put the whole conversation into one column, messages")
        return _messages({**row, "messages": [*prompt, *completion]})
    example = Passage(_text(prompt, "prompt"), _text(completion, "completion"))
    if not example.completion.strip():
        raise EmptyRow("completion is blank")
    return example, 0


def _plain_text(row: Mapping[str, Any]) -> tuple[Example, int]:
    text = _text(row.get("text"), "text")
    if not text.strip():
        raise EmptyRow("text is blank")
    return Passage("", text), 0


def _messages(row: Mapping[str, Any]) -> tuple[Example, int]:
    column = "messages" if row.get("messages") is not None or "conversations" not in row else "conversations"
    turns = _turns(row.get(column), column)
    messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    kept = _up_to_the_last_response(messages)
    return Dialogue(tuple(kept), _tools(row.get("tools"))), len(messages) - len(kept)


def _shared_conversation(row: Mapping[str, Any]) -> tuple[Example, int]:
    turns = _turns(row.get("conversations"), "conversations")
    messages: list[Message] = [_shared_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
    # A conversation may begin with a greeting of the model's, which answers no request.
    head = [m for m in messages[:1] if m["role"] == "system"]
    body = messages[len(head) :]
    first = next((i for i, message in enumerate(body) if message["role"] == "user"), len(body))
    kept = _up_to_the_last_response([*head, *body[first:]])
    return Dialogue(tuple(kept), _tools(row.get("tools"))), len(messages) - len(kept)


_READERS: dict[str, Callable[[Mapping[str, Any]], tuple[Example, int]]] = {
    "alpaca": _instruction,
    "prompt-completion": _prompt_completion,
    "messages": _messages,
    "sharegpt": _shared_conversation,
    "text": _plain_text,
}


def _turns(value: Any, column: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list | tuple):
        raise BadRow(f"{column} is {_shown(value)}, not a list of turns")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping):
            raise BadRow(f"{column}, turn {number}, is {_shown(turn)}, not an object with named fields")
    if not value:
        raise EmptyRow(f"{column} has no turns")
    return list(value)


def _message(turn: Mapping[str, Any], number: int) -> Message:
    """Read one message as OpenAI spells it, without the absent fields that tables store as null."""
    role = turn.get("role")
    if role not in MESSAGE_ROLES:
        raise BadRow(f"turn {number}: role is {_shown(role)}, not one of {', '.join(MESSAGE_ROLES)}")
    message = {name: value for name, value in turn.items() if value is not None}
    calls = role == "assistant" and message.get("tool_calls")
    content = message.get("content")
    # A call comes without words (null), and many templates cannot join null to text.
    if calls and not content:
        return {**message, "content": ""}
    if isinstance(content, list):  # parts
        message["content"] = _joined_parts(content, number)
    else:
        _text(content, f"turn {number}: content")
    return _checked(message, number)


def _shared_turn(turn: Mapping[str, Any], number: int) -> Message:
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise BadRow(f"turn {number}: from is {_shown(speaker)}, not one of {', '.join(ROLES)}")
    return _checked({"role": ROLES[speaker], "content": _text(text, f"turn {number}: value")}, number)


def _checked(message: Message, number: int) -> Message:
    if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
        raise EmptyRow(f"turn {number}: the response is blank")
    return message


def _joined_parts(parts: list[Any], number: int) -> str:
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        raise BadRow(f"turn {number}: content has parts that are not text")
    return "".join(_text(part.get("text"), f"turn {number}: content") for part in parts)


def _up_to_the_last_response(messages: list[Message]) -> list[Message]:
    """Drop the messages after the last response, which would train nothing."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise EmptyRow("has no response")
    return messages[: last + 1]


def _tools(value: Any) -> tuple[Mapping[str, Any], ...] | None:
    # A column of a table has one type, so data sets store tools of different shapes as JSON text.
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:  # too many digits in a number give a ValueError
            raise BadRow("tools is text that is not JSON") from error
    if not value:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow(f"tools is {_shown(value)}, not a list of function descriptions")
    return tuple(value)


def _speaks_openai(rows: Iterable[Mapping[str, Any]]) -> bool:
    turns = next((row["conversations"] for row in rows if isinstance(row.get("conversations"), list)), [])
    return any(isinstance(turn, Mapping) and "role" in turn and "from" not in turn for turn in turns)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer accepts
        raise BadRow(f"{name} is {_shown(value)}, with half of a surrogate pair") from error
    return value


def _listed(columns: Iterable[str]) -> str:
    """List column names on one line, each cut short: in a table without a header they are a row of data."""
    names = [name if name.isprintable() and len(name) <= LONGEST_NAME else _cut(name) for name in sorted(columns)]
    more = len(names) - COLUMNS_NAMED
    return ", ".join(names[:COLUMNS_NAMED] + [f"and {more} more"] * (more > 0)) or "(none)"


def _cut(name: str) -> str:
    return repr(name[:LONGEST_NAME] + "..." * (len(name) > LONGEST_NAME))


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
