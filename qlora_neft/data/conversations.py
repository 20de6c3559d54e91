"""Read conversations: OpenAI's messages, ShareGPT's turns in their usual spellings, and TRL's prompt and completion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .examples import BadRow, Dialogue, EmptyRow
from .messages import (
    MARKED_OTHERS,
    NOTHING,
    SPARED_OTHERS,
    SPEAKERS,
    THOUGHT,
    Read,
    is_message,
    joined,
    read_message,
    with_thought,
)
from .tool_calls import read_tools
from .values import from_json, is_blank, shown, text_of

# Turns in which one object holds a request and its response, by the names of the two.
PAIRS = (("input", "output"), ("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("question", "answer"))


class Conversation(NamedTuple):
    """A row's conversation.

    Attributes:
        dialogue: What is trained.
        left_out: Number of turns left out before the first request (of a shared conversation) or after the last
            response.
        extra: Keys of its messages that are none of OpenAI's.
        marks: What is suspicious about it, see `gate.SUSPICIOUS`.
    """

    dialogue: Dialogue
    left_out: int = 0
    extra: frozenset[str] = frozenset()
    marks: frozenset[str] = frozenset()


def read_conversation(
    row: Mapping[str, Any], column: str, roles: Mapping[str, str], *, shared: bool = False
) -> Conversation:
    """Read the conversation in one column of a row, with the row's ``system`` and ``tools``.

    Args:
        row: Values by name of column.
        column: Where the turns are: a list, or JSON text of one.
        roles: The user's names of speakers.
        shared: Whether the turns are shared from a chat page: what stands before the first request, such as a greeting,
            is left out, as in FastChat's training code.

    Raises:
        BadRow: If it is not a conversation.
        EmptyRow: If there is no response in it to learn from.
    """
    tools = read_tools(row.get("tools"))
    reads = _reads(turns_of(row.get(column), column), roles, tools or (), shared=shared)
    reads = _with_system(reads, row.get("system"), column)
    return _conversation(reads, tools, shared=shared)


def read_prompted(row: Mapping[str, Any], roles: Mapping[str, str]) -> Conversation:
    """Read TRL's conversational prompt and completion: the prompt's responses are not trained.

    Raises:
        BadRow, EmptyRow: As `read_conversation`.
    """
    tools = read_tools(row.get("tools"))
    prompt, completion = _listed(row.get("prompt"), "user"), _listed(row.get("completion"), "assistant")
    asked = _reads(turns_of(prompt, "prompt"), roles, tools or ())
    answered = _reads(turns_of(completion, "completion"), roles, tools or (), after=len(asked))
    asked = [replace(read, trained=False) if read.message["role"] == "assistant" else read for read in asked]
    reads = [*asked, *answered]
    return _conversation(_with_system(reads, row.get("system"), "prompt"), tools)


def speaks_openai(rows: Iterable[Mapping[str, Any]], column: str) -> bool:
    """Tell whether the first conversation of some rows has ``role`` for who speaks, not ShareGPT's ``from``."""
    value = next((row[column] for row in rows if not is_blank(row.get(column))), None)
    try:
        turns = turns_of(value, column)
    except BadRow:
        return False
    return any("role" in turn and turn.get("from") is None for turn in turns)


def speakers_of(value: Any, roles: Mapping[str, str]) -> set[str]:
    """Return who speaks in the turns of a column, in our names; nobody if it holds no turns."""
    try:
        said = [turn.get("role") or turn.get("from") for turn in turns_of(value, "")]
    except BadRow:
        return set()
    names = [name for name in said if isinstance(name, str)]
    return {role for name in names if (role := roles.get(name) or SPEAKERS.get(name.strip().lower()))}


def turns_of(value: Any, column: str) -> list[Mapping[str, Any]]:
    """Return the turns in a column: a list of objects, or JSON text of one.

    Raises:
        BadRow: If it holds anything else.
        EmptyRow: If there are none.
    """
    # A cell of a CSV file is text.
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, column)
    value = _as_list(value)
    if not isinstance(value, list | tuple):
        raise BadRow(f"{column} is {shown(value)}, not a list of turns")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping):
            raise BadRow(f"{column}, turn {number}, is {shown(turn)}, not an object with named fields")
    if not value:
        raise EmptyRow(f"{column} has no turns")
    return list(value) if all(map(is_message, value)) else [turn for pair in value for turn in _unpaired(pair)]


def are_turns(value: Any) -> bool:
    """Tell whether a value is a list of messages, or JSON text of one."""
    if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
        try:
            value = from_json(value, "")
        except BadRow:
            return False
    return isinstance(value, list | tuple) and bool(value) and all(map(is_message, value))


def _as_list(value: Any) -> Any:
    """Return turns that are stored field by field, as `datasets` stores a sequence of objects, one by one."""
    if not isinstance(value, Mapping) or not value:
        return value
    fields = {name: column for name, column in value.items() if column is not None}
    if not all(isinstance(column, list | tuple) for column in fields.values()):
        return value
    lengths = {len(column) for column in fields.values()}
    return (
        [{name: column[i] for name, column in fields.items()} for i in range(*lengths)] if len(lengths) == 1 else value
    )


def _unpaired(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if is_message(turn):
        return [turn]
    for asked, answered in PAIRS:
        if isinstance(turn.get(asked), str) and isinstance(turn.get(answered), str):
            rest = {key: value for key, value in turn.items() if key not in (asked, answered)}
            return [{"role": "user", "content": turn[asked]}, {**rest, "role": "assistant", "content": turn[answered]}]
    return [turn]


def _listed(value: Any, role: str) -> Any:
    """Return turns as they are, and a text as one turn."""
    return [{"role": role, "content": value}] if isinstance(value, str) and not are_turns(value) else value


def _reads(
    turns: Sequence[Mapping[str, Any]],
    roles: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]],
    *,
    shared: bool = False,
    after: int = 0,
) -> list[Read]:
    """Read turns to messages: a call of its own joins the message before it, a thought the one after it."""
    reads: list[Read] = []
    thought: str | None = None
    for number, turn in enumerate(turns, start=after + 1):
        read = read_message(turn, number, roles, tools, shared=shared)
        if read.message["role"] == THOUGHT:
            if thought is not None:
                raise BadRow(f"turn {number}: a second thought before the assistant's turn")
            thought = read.message["content"]
            continue
        if thought is not None:
            read, thought = with_thought(read, thought, f"turn {number}"), None
        before = reads[-1] if reads else None
        if read.is_part and before is not None and before.message["role"] == "assistant":
            reads[-1] = joined(before, read, f"turn {number}")
        else:
            reads.append(read)
    if thought is not None:
        raise BadRow("its last turn is a thought, with no response after it")
    return reads


def _with_system(reads: list[Read], system: Any, column: str) -> list[Read]:
    """Put the column ``system`` before a conversation."""
    if is_blank(system):
        return reads
    said = text_of(system, "system")
    if not reads[:1] or reads[0].message["role"] not in ("system", "developer"):
        return [Read({"role": "system", "content": said}), *reads]
    if reads[0].message["content"].strip() != said.strip():
        raise BadRow(
            f"has a system message in {column} and another one in the column system; data.columns={{system: null}} "
            "leaves the column out"
        )
    return reads


def _conversation(
    reads: Sequence[Read], tools: tuple[Mapping[str, Any], ...] | None, *, shared: bool = False
) -> Conversation:
    count = len(reads)
    if shared:
        head = [read for read in reads[:1] if read.message["role"] in ("system", "developer")]
        body = reads[len(head) :]
        first = next((i for i, read in enumerate(body) if read.message["role"] == "user"), len(body))
        reads = [*head, *body[first:]]
    last = next((i for i in reversed(range(len(reads))) if reads[i].message["role"] == "assistant"), None)
    if last is None:
        raise EmptyRow("has no response")
    kept = reads[: last + 1]  # what comes after the last response would train nothing
    trained, marks = None, NOTHING
    if any(read.trained is not None for read in kept):
        trained = tuple(read.trained is not False for read in kept)
        if not any(flag for flag, read in zip(trained, kept, strict=True) if read.message["role"] == "assistant"):
            raise EmptyRow("has no response that is trained, by its own marks")
        others = {read.trained for read in kept if read.message["role"] != "assistant"}
        names = {True: MARKED_OTHERS, False: SPARED_OTHERS}
        marks = frozenset(name for flag, name in names.items() if flag in others)
    return Conversation(
        Dialogue(tuple(read.message for read in kept), tools, trained),
        count - len(kept),
        NOTHING.union(*(read.extra for read in reads)),
        marks,
    )
