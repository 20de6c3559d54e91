"""The formats that rows come in, and the example that a row of each states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserInputError
from .columns import Columns, find_columns, plain_columns
from .conversations import (
    Conversation,
    are_turns,
    read_conversation,
    read_prompted,
    speakers_of,
    speaks_openai,
)
from .examples import BadRow, Dialogue, EmptyRow, Example, Instruction, Passage, as_dialogue
from .messages import CALL, REASONING, THOUGHT
from .tool_calls import read_tools
from .values import from_json, is_blank, shown, text_of

# What makes a row of Alpaca's form a conversation, which Alpaca's own prompt has no place for.
CONVERSATIONAL = ("system", "history", "reasoning")


@dataclass(frozen=True)
class RowRead:
    """A row read.

    Attributes:
        example: What it states.
        turns_left_out: Those before the first request of a shared conversation (as in FastChat's training code), and
            those after the last response.
        marks: What is suspicious about it, see `gate.SUSPICIOUS`.
        columns_not_read: Its columns that nothing is read from, except empty ones.
        extra_keys: Keys of its messages that are none of OpenAI's; a template may read them.
    """

    example: Example
    turns_left_out: int = 0
    marks: frozenset[str] = frozenset()
    columns_not_read: frozenset[str] = frozenset()
    extra_keys: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one source.

    Attributes:
        columns: Which of its columns is what.
        roles: The user's names of speakers, to ours: ``data.roles``.
        system_prompt: System message of the rows that have none: ``data.system_prompt``.
        conversation: The template of conversations, if rows of a format whose own template has no place for them are
            conversations: ``vicuna``, or ``chat`` for messages; None if they are not.
        beyond: What rows have that only chat templates have a place for, in words; empty if nothing.
    """

    columns: Columns
    roles: Mapping[str, str] = field(default_factory=dict)
    system_prompt: str | None = None
    conversation: str | None = None
    beyond: str = ""

    @property
    def format(self) -> str:
        """One of `columns.REQUIRED_COLUMNS`."""
        return self.columns.format

    def template(self, stated: str) -> str:
        """Return the prompt template for the rows: the stated one, unless that is ``auto`` and they are conversations
        in the columns of single exchanges."""
        return self.conversation or stated if stated == "auto" else stated

    def read(self, row: Mapping[str, Any]) -> RowRead:
        """Read one row.

        Raises:
            BadRow: If the row does not fit the format.
            EmptyRow: If there is nothing to learn in it.
        """
        found = _READERS[self.format](self.columns.of(row), self.roles)
        unread = self.columns.not_read(row)
        unread = frozenset(name for name in unread if not is_blank(row.get(name))) if unread else frozenset()
        if self.format == "messages" and row.get("messages") is not None and not is_blank(row.get("conversations")):
            unread |= {"conversations"}  # read of rows without messages
        if isinstance(found, Conversation):
            read = RowRead(found.dialogue, found.left_out, found.marks, unread, found.extra)
        else:
            read = RowRead(found, columns_not_read=unread)
        if self.system_prompt is not None:
            return replace(read, example=_with_system(read.example, self.system_prompt))
        return read


def row_reader(
    rows: Sequence[Mapping[str, Any]],
    format: str = "auto",
    columns: Mapping[str, str | None] | None = None,
    roles: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    key: str = "data.path",
    path: str | None = None,
) -> RowReader:
    """Find out how the rows of a source are to be read.

    Args:
        rows: Its first rows.
        format: The format the recipe states, or ``auto``.
        columns, roles, system_prompt: What the recipe says of the rows, see `recipe.data`.
        key: The name the caller wrote for the source, for messages.
        path: Where the rows are from, for messages.

    Raises:
        UserInputError: If no format fits them, or the stated one does not.
    """
    found = find_columns(rows, format, columns, key, path)
    # Some data sets have OpenAI's messages in ShareGPT's column.
    if format == "auto" and found.format == "sharegpt":
        [column] = [found.paths["conversations"]]
        if speaks_openai([{"conversations": found.of(row).get("conversations")} for row in rows], "conversations"):
            found = replace(found, format="messages", paths={**found.paths, "conversations": column})
    if system_prompt is not None and found.format == "text":
        raise UserInputError("data.system_prompt: plain text has no place for a system message. Remove it.")
    values = [found.of(row) for row in rows]
    converse = _conversation(found.format, values, system_prompt)
    return RowReader(found, dict(roles or {}), system_prompt, converse, _beyond(found.format, values, roles or {}))


def _beyond(format: str, rows: Sequence[Mapping[str, Any]], roles: Mapping[str, str]) -> str:
    """Return what rows have that Alpaca's and Vicuna's prompts have no place for: tools, calls or thoughts."""
    if format == "alpaca":
        return "thoughts" if any(not is_blank(row.get("reasoning")) for row in rows) else ""
    if format != "sharegpt":  # messages are rendered by a chat template as it is
        return ""
    if any(_describes(row.get("tools")) for row in rows):
        return "tools"
    said = {speaker for row in rows for speaker in speakers_of(row.get("conversations"), roles)}
    return "calls" if said & {CALL, "tool"} else "thoughts" if THOUGHT in said else ""


def _describes(tools: Any) -> bool:
    try:
        return read_tools(tools) is not None
    except (BadRow, RecursionError):  # said of the row
        return False


def _conversation(format: str, rows: Sequence[Mapping[str, Any]], system_prompt: str | None) -> str | None:
    if format not in ("alpaca", "prompt-completion"):  # whose templates have room
        return None
    if any(are_turns(row.get(name)) for row in rows for name in ("prompt", "completion")):
        return "chat"
    converse = system_prompt is not None or any(not is_blank(row.get(name)) for row in rows for name in CONVERSATIONAL)
    return "vicuna" if converse else None


def to_example(row: Mapping[str, Any], format: str) -> tuple[Example, int]:
    """Read one row whose columns have the format's own names.

    Args:
        row: Values by column name.
        format: One of `columns.REQUIRED_COLUMNS`.

    Returns:
        The example, and how many turns were left out, see `RowRead`.

    Raises:
        BadRow: If the row does not fit the format.
        EmptyRow: If there is nothing to learn in it.
    """
    read = RowReader(plain_columns(format)).read(row)
    return read.example, read.turns_left_out


def _instruction(row: Mapping[str, Any], roles: Mapping[str, str]) -> Example:
    # Missing or null means no input, as an empty text does.
    given = "" if row.get("input") is None else row["input"]
    example = Instruction(
        text_of(row.get("instruction"), "instruction"), text_of(given, "input"), text_of(row.get("output"), "output")
    )
    if not (example.instruction + example.input).strip():
        raise EmptyRow("instruction and input are blank")
    if not example.output.strip():
        raise EmptyRow("output is blank")
    if all(is_blank(row.get(name)) for name in CONVERSATIONAL):
        return example
    # LLaMA-Factory's form: the exchanges before this one, whose responses it trains too.
    request, response = as_dialogue(example).messages
    if not is_blank(row.get("reasoning")):
        response = {**response, REASONING: text_of(row["reasoning"], "reasoning")}
    dialogue = Dialogue((*_history(row.get("history")), request, response))
    return dialogue if is_blank(row.get("system")) else _with_system(dialogue, text_of(row["system"], "system"))


def _history(value: Any) -> list[dict[str, str]]:
    if is_blank(value):
        return []
    pairs = from_json(value, "history") if isinstance(value, str) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise BadRow(f"history is {shown(value)}, not a list of pairs of request and response")
    messages = []
    for asked, answered in pairs:
        messages.append({"role": "user", "content": text_of(asked, "history")})
        messages.append({"role": "assistant", "content": text_of(answered, "history")})
        if not answered.strip():
            raise EmptyRow("a response of its history is blank")
    return messages


def _prompt_completion(row: Mapping[str, Any], roles: Mapping[str, str]) -> Example | Conversation:
    prompt, completion = row.get("prompt"), row.get("completion")
    if are_turns(prompt) or are_turns(completion):
        return read_prompted(row, roles)
    example = Passage(text_of(prompt, "prompt"), text_of(completion, "completion"))
    if not example.completion.strip():
        raise EmptyRow("completion is blank")
    return example if is_blank(row.get("system")) else _with_system(example, text_of(row["system"], "system"))


def _plain_text(row: Mapping[str, Any], roles: Mapping[str, str]) -> Example:
    text = text_of(row.get("text"), "text")
    if not text.strip():
        raise EmptyRow("text is blank")
    return Passage("", text)


def _messages(row: Mapping[str, Any], roles: Mapping[str, str]) -> Conversation:
    column = "messages" if row.get("messages") is not None or "conversations" not in row else "conversations"
    return read_conversation(row, column, roles)


def _shared(row: Mapping[str, Any], roles: Mapping[str, str]) -> Conversation:
    return read_conversation(row, "conversations", roles, shared=True)


_READERS = {
    "alpaca": _instruction,
    "prompt-completion": _prompt_completion,
    "messages": _messages,
    "sharegpt": _shared,
    "text": _plain_text,
}


def _with_system(example: Example, system: str) -> Example:
    """Put a system message before an example, unless it has its own."""
    dialogue = as_dialogue(example)
    if dialogue.messages[0]["role"] in ("system", "developer"):
        return example
    trained = None if dialogue.trained is None else (False, *dialogue.trained)
    return Dialogue(({"role": "system", "content": system}, *dialogue.messages), dialogue.tools, trained)
