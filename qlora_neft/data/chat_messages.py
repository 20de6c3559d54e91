"""Messages in the form that a chat template takes: text contents, calls as objects or as text, ids it accepts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .chat_markers import REASONING, thought_in_text
from .chat_wording import CallForm
from .examples import BadRow, Message

Messages = list[dict[str, Any]]
OF_NINE = re.compile(r"[a-zA-Z0-9]{9}")


def plain_messages(messages: Sequence[Message]) -> Messages:
    """Return messages as dictionaries whose contents are strings, None or missing, text parts joined.

    Raises:
        BadRow: If a content is anything else.
    """
    plain = [dict(message) for message in messages]
    for number, message in enumerate(plain):
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            message["content"] = _joined(content, number)
    return plain


def taken(messages: Messages, form: CallForm | None, *, takes_thoughts: bool) -> Messages:
    """Return messages in the form that a template takes.

    Args:
        messages: As `plain_messages` returns them.
        form: How the template takes calls, None if it takes none: calls then stay as they are.
        takes_thoughts: Whether it takes thoughts as a field; those in the text then move there.

    Raises:
        BadRow: If arguments are text that is not JSON.
    """
    ids: list[str] = []  # of calls that wait for their results
    for number, message in enumerate(messages):
        role = message.get("role")
        if role == "assistant":
            _name_thought(message, takes_thoughts=takes_thoughts)
        if form is None or not (message.get("tool_calls") or role == "tool"):
            continue
        if role == "tool":
            if form.nine:
                waiting = ids.pop(0) if ids else ""
                message["tool_call_id"] = _of_nine(message.get("tool_call_id") or waiting)
        elif isinstance(message["tool_calls"], Sequence):
            message["tool_calls"] = [_call(call, number, form) for call in message["tool_calls"]]
            ids = [call.get("id", "") for call in message["tool_calls"] if isinstance(call, Mapping)]
            if not (message.get("content") or "").strip():
                message["content"] = None if form.nulls else ""
    return messages


def _name_thought(message: dict[str, Any], *, takes_thoughts: bool) -> None:
    """Give the thought under both names that templates read; newer versions of transformers do so by themselves."""
    thought = next((message[key] for key in REASONING if message.get(key)), None)
    content = message.get("content")
    if thought is None and takes_thoughts and content and (found := thought_in_text(content)) and found[2]:
        thought, message["content"] = found[2], found[4]
    if thought is not None:
        message |= {"reasoning_content": thought, "thinking": thought}


def _call(call: Any, number: int, form: CallForm) -> Any:
    if not isinstance(call, Mapping):
        return call
    stated = dict(call)
    if not isinstance(stated.get("function"), Mapping) and "name" in stated:  # flat, as older data sets have it
        stated = {"function": {key: stated.pop(key) for key in ("name", "arguments") if key in stated}, **stated}
    if not isinstance(stated.get("function"), Mapping):
        return call
    function = dict(stated["function"])
    function["arguments"] = _arguments(function.get("arguments"), number, form)
    rest = {key: value for key, value in stated.items() if key not in ("type", "function")}
    if form.nine:
        rest["id"] = _of_nine(rest.get("id") or f"{number} {json.dumps(function, sort_keys=True, default=str)}")
    return {**rest, "type": stated.get("type") or "function", "function": function}


def _arguments(value: Any, number: int, form: CallForm) -> Any:
    if value is None:
        value = {}
    if form.as_text:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError) as error:
        raise BadRow(f"message {number + 1} calls a tool with arguments that are not JSON: {value[:40]!r}") from error


def _of_nine(id: Any) -> str:
    """Return an id as it is, if it has nine letters and digits; else nine that depend on it alone."""
    text = str(id)
    return text if OF_NINE.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:9]


def _joined(content: Any, number: int) -> str:
    parts = content if isinstance(content, (list, tuple)) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRow(f"message {number + 1} has content that is not text")
    return "".join(part["text"] for part in parts)
