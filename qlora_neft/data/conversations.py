"""Read conversations: OpenAI's messages, and ShareGPT's turns in their usual spellings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from .examples import BadRow, Dialogue, EmptyRow, Example, Message
from .values import shown, text_of

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
MESSAGE_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(row: Mapping[str, Any]) -> tuple[Example, int]:
    column = "messages" if row.get("messages") is not None or "conversations" not in row else "conversations"
    turns = _turns(row.get(column), column)
    messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    kept = _up_to_the_last_response(messages)
    return Dialogue(tuple(kept), _tools(row.get("tools"))), len(messages) - len(kept)


def read_shared(row: Mapping[str, Any]) -> tuple[Example, int]:
    turns = _turns(row.get("conversations"), "conversations")
    messages: list[Message] = [_shared_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": text_of(row["system"], "system")})
    # A conversation may begin with a greeting of the model's, which answers no request.
    head = [m for m in messages[:1] if m["role"] == "system"]
    body = messages[len(head) :]
    first = next((i for i, message in enumerate(body) if message["role"] == "user"), len(body))
    kept = _up_to_the_last_response([*head, *body[first:]])
    return Dialogue(tuple(kept), _tools(row.get("tools"))), len(messages) - len(kept)


def _turns(value: Any, column: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list | tuple):
        raise BadRow(f"{column} is {shown(value)}, not a list of turns")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping):
            raise BadRow(f"{column}, turn {number}, is {shown(turn)}, not an object with named fields")
    if not value:
        raise EmptyRow(f"{column} has no turns")
    return list(value)


def _message(turn: Mapping[str, Any], number: int) -> Message:
    """Read one message as OpenAI spells it, without the absent fields that tables store as null."""
    role = turn.get("role")
    if role not in MESSAGE_ROLES:
        raise BadRow(f"turn {number}: role is {shown(role)}, not one of {', '.join(MESSAGE_ROLES)}")
    message = {name: value for name, value in turn.items() if value is not None}
    calls = role == "assistant" and message.get("tool_calls")
    content = message.get("content")
    # A call comes without words (null), and many templates cannot join null to text.
    if calls and not content:
        return {**message, "content": ""}
    if isinstance(content, list):  # parts
        message["content"] = _joined_parts(content, number)
    else:
        text_of(content, f"turn {number}: content")
    return _checked(message, number)


def _shared_turn(turn: Mapping[str, Any], number: int) -> Message:
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise BadRow(f"turn {number}: from is {shown(speaker)}, not one of {', '.join(ROLES)}")
    return _checked({"role": ROLES[speaker], "content": text_of(text, f"turn {number}: value")}, number)


def _checked(message: Message, number: int) -> Message:
    if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
        raise EmptyRow(f"turn {number}: the response is blank")
    return message


def _joined_parts(parts: list[Any], number: int) -> str:
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        raise BadRow(f"turn {number}: content has parts that are not text")
    return "".join(text_of(part.get("text"), f"turn {number}: content") for part in parts)


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
        raise BadRow(f"tools is {shown(value)}, not a list of function descriptions")
    return tuple(value)


def speaks_openai(rows: Iterable[Mapping[str, Any]]) -> bool:
    turns = next((row["conversations"] for row in rows if isinstance(row.get("conversations"), list)), [])
    return any(isinstance(turn, Mapping) and "role" in turn and "from" not in turn for turn in turns)
