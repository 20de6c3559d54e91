"""Read one message: who speaks, what is said, thought and called, and whether the loss is taken on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .examples import BadRow, EmptyRow
from .tool_calls import Tool, read_calls
from .values import is_blank, normal, shown, text_of

ROLES = ("system", "developer", "user", "assistant", "tool")
# A turn that is one or several calls, and one that is the thought before the next turn.
CALL, THOUGHT = "function_call", "thought"
# Names of speakers in shared conversations, as published data sets spell them.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": CALL,
    "tool_call": CALL,
    "thought": THOUGHT,
    "thinking": THOUGHT,
    "reasoning": THOUGHT,
}
SPEAKER_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")
THINK, END_OF_THINK = "<think>", "</think>"
REASONING, REASONING_KEYS = "reasoning_content", ("reasoning_content", "reasoning", "thinking")
# OpenAI's fine-tuning format has weight; the others are of axolotl (train, training), ms-swift (loss), and common.
LOSS_KEYS = ("weight", "train", "training", "loss", "loss_mask")
# Axolotl's marks on parts of a turn.
DETAIL_KEYS = ("train_detail", "training_detail", "train_details")
# Keys that templates may read, whether the one at hand does or not; others are listed as not used if it does not.
READ_KEYS = frozenset(
    (*SPEAKER_KEYS, *TEXT_KEYS, *LOSS_KEYS, *REASONING_KEYS, "tool_calls", "function_call", "tool_call_id", "name")
)
NOT_PASSED_ON = READ_KEYS - {"name", "tool_call_id"}
MARKING_KEYS = frozenset((*LOSS_KEYS, *DETAIL_KEYS))
NOTHING: frozenset[str] = frozenset()
MARKED_OTHERS = "marked others"  # a message of another role than the assistant's is marked as trained
SPARED_OTHERS = "spared others"  # or as not trained


@dataclass(slots=True)
class Read:
    """One message read.

    Attributes:
        message: With ``role`` and ``content``, and whatever else the row has of OpenAI's keys, nulls left out.
        trained: Whether the row says that the loss is taken on it; None if it says nothing.
        is_part: Whether it belongs to the assistant's message before it: a call in a turn of its own.
        extra: Keys that are none of OpenAI's.
    """

    message: dict[str, Any]
    trained: bool | None = None
    is_part: bool = False
    extra: frozenset[str] = NOTHING


def read_message(
    turn: Mapping[str, Any], number: int, roles: Mapping[str, str], tools: Sequence[Tool] = (), *, shared: bool = False
) -> Read:
    """Read one message.

    Args:
        turn: The message, with ``role`` and ``content`` or ShareGPT's ``from`` and ``value``.
        number: Its place in the conversation from 1, for messages.
        roles: The user's names of speakers.
        tools: The functions described in the row.
        shared: Whether its own keys come first in messages of errors: ShareGPT's.

    Raises:
        BadRow: If it is no message.
        EmptyRow: If it is an assistant's without words and calls.
    """
    plain = _plain(turn, number, roles)
    if plain is not None:
        return plain
    where = f"turn {number}"
    role = _role(turn, where, roles, shared=shared)
    trained = _trained(turn, where)
    content_key = next((key for key in TEXT_KEYS if turn.get(key) is not None), TEXT_KEYS[shared])
    extra = frozenset()
    if not turn.keys() <= READ_KEYS:
        extra = frozenset(key for key in turn if key not in READ_KEYS and not is_blank(turn[key]))
    if role == CALL:
        calls = read_calls(turn.get(content_key), where, tools)
        return Read({"role": "assistant", "content": "", "tool_calls": calls}, trained, is_part=True, extra=extra)
    content, thoughts = turn.get(content_key), []
    if isinstance(content, list):
        content, thoughts = _joined_parts(content, where)
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        thought = _thought(turn, thoughts, where)
        message |= {REASONING: thought} if thought else {}
        calls = _calls(turn, where, tools)
        message |= {"tool_calls": calls} if calls else {}
    elif thoughts:
        raise BadRow(f"{where}: content has parts that are not text")
    elif not is_blank(turn.get("tool_calls")):
        raise BadRow(f"{where}: {role} has tool_calls, which are the assistant's")
    # A call comes without words (null), and many templates cannot join null to text.
    if "tool_calls" in message and content is None:
        message["content"] = ""
    said = text_of(message["content"], f"{where}: {content_key}")
    answer = said
    if role == "assistant" and THINK in said:
        said, answer = _without_its_thought(said, message.get(REASONING), where)
        if answer is None and trained is not False:
            raise EmptyRow(f"{where}: its thought has no {END_OF_THINK}, so it holds no response")
    message["content"] = said
    if not shared:  # a template may read any key of a message
        message |= {key: normal(turn[key]) for key in sorted(map(str, turn)) if _is_passed_on(key, turn)}
    elif turn.get("name") is not None:
        message["name"] = turn["name"]
    if role == "assistant" and answer is not None and not answer.strip() and "tool_calls" not in message:
        raise EmptyRow(f"{where}: the response is blank")
    return Read(message, trained, extra=extra)


def _plain(turn: Mapping[str, Any], number: int, roles: Mapping[str, str]) -> Read | None:
    """Read a message that has a speaker and a text and no more, as nearly all are; None for any other."""
    if len(turn) != 2:
        return None
    speaker, text = (turn.get("role"), turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) and speaker not in roles else None
    # What is wrong with others is said below.
    if role not in ROLES or not isinstance(text, str) or not text.strip() or THINK in text:
        return None
    return Read({"role": role, "content": text_of(text, f"turn {number}: content")})


def _is_passed_on(key: str, turn: Mapping[str, Any]) -> bool:
    return key not in NOT_PASSED_ON and turn.get(key) is not None


def _role(turn: Mapping[str, Any], where: str, roles: Mapping[str, str], *, shared: bool) -> str:
    key = next((key for key in SPEAKER_KEYS if turn.get(key) is not None), SPEAKER_KEYS[shared])
    speaker = turn.get(key)
    if isinstance(speaker, str):
        found = roles.get(speaker) or SPEAKERS.get(speaker.strip().lower())
        if found:
            return found
    names = ", ".join(dict.fromkeys([*roles, *(SPEAKERS if shared else ROLES)]))
    hint = "; data.roles says what others mean" if isinstance(speaker, str) else ""
    raise BadRow(f"{where}: {key} is {shown(speaker)}, not one of {names}{hint}")


def _trained(turn: Mapping[str, Any], where: str) -> bool | None:
    """Return what a message's own keys say of the loss on it, None if they say nothing."""
    if turn.keys().isdisjoint(MARKING_KEYS):  # nearly always
        return None
    for key in DETAIL_KEYS:
        if not is_blank(turn.get(key)):
            raise BadRow(f"{where}: {key} marks parts of a turn, and the loss is on whole turns; use {LOSS_KEYS[1]}")
    said = {key: turn[key] for key in LOSS_KEYS if turn.get(key) is not None}
    for key, value in said.items():
        # 1.0 and True equal 1; Parquet makes floats of whole numbers beside null.
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            allowed = "true or false" if isinstance(value, str) and key.startswith("train") else "0 or 1"
            raise BadRow(f"{where}: {key} is {shown(value)}, not {allowed}")
    if len({bool(value) for value in said.values()}) > 1:
        raise BadRow(f"{where}: {' and '.join(said)} contradict each other")
    return next((bool(value) for value in said.values()), None)


def _calls(turn: Mapping[str, Any], where: str, tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    # function_call: OpenAI's older form, of a single call.
    found = [turn[key] for key in ("tool_calls", "function_call") if not is_blank(turn.get(key))]
    return [call for value in found for call in read_calls(value, where, tools)]


def _thought(turn: Mapping[str, Any], parts: Sequence[str], where: str) -> str:
    """Return what an assistant thinks before it speaks, under whichever name the row has it."""
    found = [text_of(turn[key], f"{where}: {key}") for key in REASONING_KEYS if not is_blank(turn.get(key))]
    found += ["\n\n".join(parts)] if parts else []
    if len(set(found)) > 1:
        raise BadRow(f"{where}: its thought is given twice, and differently")
    return found[0] if found else ""


def _without_its_thought(said: str, thought: str | None, where: str) -> tuple[str, str | None]:
    """Return a text without the thought it begins with, if that is given in a field too; and the answer in it.

    The answer is None where the thought has no end: generation was cut in the middle of it.
    """
    if not said.lstrip().startswith(THINK):
        return said, said
    inner, end, answer = said.lstrip().removeprefix(THINK).partition(END_OF_THINK)
    if not end:
        return said, None
    if not thought:
        return said, answer
    if inner.strip() not in ("", thought.strip()):
        raise BadRow(f"{where}: its thought is given twice, and differently")
    return answer.lstrip("\n"), answer


def _joined_parts(parts: Sequence[Any], where: str) -> tuple[str, list[str]]:
    """Return the text of a content in parts, and its thoughts."""
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(text_of(part.get("text"), f"{where}: content"))
        elif kind in ("thinking", "reasoning"):
            value = next((part[key] for key in (kind, "text") if part.get(key) is not None), None)
            inner = _joined_parts(value, where)[0] if isinstance(value, list) else value  # Mistral's are in parts too
            thoughts.append(text_of(inner, f"{where}: {kind}"))
        else:
            raise BadRow(f"{where}: content has parts that are not text")
    return "".join(texts), thoughts


def joined(first: Read, second: Read, where: str) -> Read:
    """Return an assistant's message with the calls of the turn that follows it.

    Raises:
        BadRow: If the row takes the loss on one of the two only.
    """
    if first.trained != second.trained:
        raise BadRow(f"{where}: the words before a call and the call are one message, trained or not as a whole")
    calls = [*first.message.get("tool_calls", ()), *second.message["tool_calls"]]
    return Read({**first.message, "tool_calls": calls}, first.trained, first.is_part, first.extra | second.extra)


def with_thought(read: Read, thought: str, where: str) -> Read:
    """Return an assistant's message with a thought that stood in a turn of its own before it.

    Raises:
        BadRow: If what follows is not the assistant's, or has a thought already.
    """
    if read.message["role"] != "assistant" or REASONING in read.message:
        raise BadRow(f"{where}: a thought stands before the assistant's turn, which has none of its own")
    return Read({**read.message, REASONING: thought}, read.trained, read.is_part, read.extra)


def is_message(value: Any) -> bool:
    """Tell whether a value is an object with a speaker."""
    return isinstance(value, Mapping) and (isinstance(value.get("role"), str) or isinstance(value.get("from"), str))
