"""Characters that no text contains, put around the strings of a conversation: where they land, the strings land.

Rendering the first messages of a conversation does not always give the beginning of its rendering: templates trim
contents, drop the reasoning of earlier turns, move the system message. So the messages are rendered once more with a
private-use character at either end of their strings. What a template leaves out leaves no marker.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .examples import BadRow, Message

Span = tuple[int, int]
FIRST = 0x100000  # private use, plane 16. Icon fonts use plane 15.
MARKER = re.compile("[\U00100000-\U0010ffff]")
# Kinds of strings. Each has two characters of a message's: the even one begins a string, the odd one ends it.
CONTENT, THOUGHT, ARGUMENT = range(3)
STRIDE = 8  # characters of a message
# Names that templates have for an assistant's reasoning; the first is the one that our messages carry.
REASONING = ("reasoning_content", "thinking", "reasoning")
# A thought that is written into the content, and the answer behind it. The opening may have stood in the prompt; the
# closing then has a line to itself, or a response that speaks of the tag would be taken for a thought.
THOUGHT_IN_TEXT = (
    re.compile(r"(\s*<think>\s*)((?:(?!</?think>).)*?)(\s*</think>\s*)((?:(?!</?think>).)*)", re.DOTALL),
    re.compile(r"(\s*)((?:(?!</?think>).)*?)(\n\s*</think>\s*\n\s*)((?:(?!</?think>).)*)", re.DOTALL),
)
AMBIGUOUS = (
    "the chat template rewrites this conversation so that its responses cannot be told apart; "
    "set data.prompt_template to a Jinja file that marks them with {% generation %}"
)


class Marker(NamedTuple):
    """A marker's place in the rendering, the number of its message, its kind, and at which end of a string it was."""

    position: int
    owner: int
    kind: int
    is_begin: bool


def mark(messages: Sequence[Message], *, blanks: bool = True, requests: bool = True) -> list[dict]:
    """Return messages with markers around their strings.

    Args:
        messages: Messages whose contents are strings, None or missing.
        blanks: Whether to mark contents of nothing but white space; a template that tests for blank contents then
            takes another branch.
        requests: Whether to mark messages of other roles than the assistant.
    """
    _check_room(len(messages))
    return [
        _mark_message(message, FIRST + STRIDE * number, blanks)
        if requests or message.get("role") == "assistant"
        else dict(message)
        for number, message in enumerate(messages)
    ]


def mark_tools(tools: Sequence[Any] | None, num_messages: int) -> list[Any] | None:
    """Return tools with markers around their names, numbered after the messages."""
    if not tools:
        return None
    _check_room(num_messages + len(tools))
    return [_mark_tool(tool, FIRST + STRIDE * number) for number, tool in enumerate(tools, start=num_messages)]


def ways_to_mark(messages: Sequence[Message]) -> list[dict[str, bool]]:
    """Return options of marking, the most informative first; few rows need more than the first."""
    has_blank = any(not message["content"].strip() for message in messages if message.get("content") is not None)
    # Without a blank content the first two would mark the same.
    ways = [{"blanks": True}] * has_blank + [{"blanks": False}]
    return [*ways, {"blanks": False, "requests": False}]


def marked(
    messages: Sequence[Message], tools: list[Any] | None, options: Mapping[str, bool]
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Return messages and tools with markers, by one of the `ways_to_mark`."""
    described = mark_tools(tools, len(messages)) if options.get("requests", True) else tools
    return mark(messages, **options), described


def read_marks(marked: str) -> tuple[str, list[Marker]]:
    """Return a rendering without its markers, and the markers in the order of the text."""
    markers = []
    for number, found in enumerate(MARKER.finditer(marked)):
        owner, code = divmod(ord(found.group()) - FIRST, STRIDE)
        kind, is_end = divmod(code, 2)
        markers.append(Marker(found.start() - number, owner, kind, not is_end))  # the text loses those before it too
    return MARKER.sub("", marked), markers


def thought_and_answer(message: Message) -> tuple[str, str]:
    """Return an assistant's thought, from a field of its own or the content, and what it says after it; stripped."""
    content = message.get("content") or ""
    for key in REASONING:
        if isinstance(message.get(key), str) and message[key].strip():
            return message[key].strip(), content.strip()
    found = thought_in_text(content)
    return (found[2].strip(), found[4].strip()) if found else ("", content.strip())


def thought_in_text(content: str) -> re.Match[str] | None:
    """Match a content that begins with a thought: the opening, the thought, the closing, the answer."""
    if "</think>" not in content:
        return None
    return next((found for pattern in THOUGHT_IN_TEXT if (found := pattern.fullmatch(content))), None)


def num_arguments(message: Message) -> int:
    """Count the strings in the arguments of a message's calls that `mark` puts markers around."""
    calls = [call for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    functions = [call["function"] if isinstance(call.get("function"), Mapping) else call for call in calls]
    return sum(_num_strings(function.get("arguments")) for function in functions)


def _check_room(count: int) -> None:
    # Plane 16 has 0x10000 characters.
    if count > 0x10000 // STRIDE:
        raise BadRow("has more than 8,192 messages and tools")


def _mark_message(message: Message, first: int, blanks: bool) -> dict[str, Any]:
    marked = dict(message)
    content = message.get("content")
    is_response = message.get("role") == "assistant"
    # Most templates break lines depending on whether a call comes with words: never turn no words into some.
    if isinstance(content, str) and (content.strip() or (blanks and not message.get("tool_calls"))):
        found = thought_in_text(content) if is_response else None
        marked["content"] = _mark_thought(found, first) if found else _wrap(content, first, CONTENT)
    if is_response:
        marked |= {key: _wrap_all(message[key], first, THOUGHT) for key in REASONING if message.get(key)}
        if isinstance(message.get("tool_calls"), Sequence):
            marked["tool_calls"] = [_mark_call(call, first) for call in message["tool_calls"]]
    return marked


def _mark_thought(found: re.Match[str], first: int) -> str:
    # Templates cut at the tags, and write one side, both, or both apart.
    opening, thought, closing, answer = found.groups()
    said = _wrap(answer, first, CONTENT) if answer.strip() else answer
    return opening + (_wrap(thought, first, THOUGHT) if thought else "") + closing + said


def _mark_call(call: Any, first: int) -> Any:
    """Mark a tool call's arguments; not its id, whose length templates test, nor its name, which results repeat."""
    if not isinstance(call, Mapping):
        return call
    marked = dict(call)
    if "function" in call:
        marked["function"] = _mark_call(call["function"], first)
    if "arguments" in call:
        marked["arguments"] = _wrap_all(call["arguments"], first, ARGUMENT)
    return marked


def _mark_tool(tool: Any, first: int) -> Any:
    if not isinstance(tool, Mapping):
        return tool
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": _mark_tool(tool["function"], first)}
    name = tool.get("name")
    return {**tool, "name": _wrap(name, first, CONTENT)} if isinstance(name, str) else tool


def _wrap_all(value: Any, first: int, kind: int) -> Any:
    if isinstance(value, str):
        return _wrap(value, first, kind) if value.strip() else value
    if isinstance(value, Mapping):
        return {key: _wrap_all(item, first, kind) for key, item in value.items()}
    return [_wrap_all(item, first, kind) for item in value] if isinstance(value, list) else value


def _num_strings(value: Any) -> int:
    if isinstance(value, str):
        return 1 if value.strip() else 0
    if isinstance(value, Mapping):
        return sum(map(_num_strings, value.values()))
    return sum(map(_num_strings, value)) if isinstance(value, list) else 0


def _wrap(text: str, first: int, kind: int) -> str:
    """Put markers inside the outer white space, so that a template that trims leaves the same text as without them."""
    core = text.strip()
    leading = len(text) - len(text.lstrip())
    begin, end = chr(first + 2 * kind), chr(first + 2 * kind + 1)
    return text[:leading] + begin + core + end + text[leading + len(core) :]
