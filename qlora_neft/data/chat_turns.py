"""Find the assistant's turns in a rendered conversation, by the markers of its strings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from .chat_markers import (
    AMBIGUOUS,
    ARGUMENT,
    CONTENT,
    THOUGHT,
    Marker,
    Span,
    num_arguments,
    read_marks,
    thought_and_answer,
)
from .chat_wording import CallForm, Wording
from .examples import BadRow, Message

TAIL = 24  # characters of a prompt that are compared


@dataclass(frozen=True)
class Turn:
    """An assistant's turn in a rendering.

    Attributes:
        number: The number of its message, from 0.
        spans: Its stretches of characters that are trained, in order; one, unless the template marks several.
        whole_from: The character from which on a cut leaves an answer: the end of its thought, or of its calls.
        is_prompted: Whether it stands behind the text that the prompt of generation ends with.
    """

    number: int
    spans: tuple[Span, ...]
    whole_from: int
    is_prompted: bool = True

    @property
    def begin(self) -> int:
        """The turn's first character."""
        return self.spans[0][0]

    @property
    def end(self) -> int:
        """The character behind the turn."""
        return self.spans[-1][1]


@dataclass(frozen=True)
class Rendering:
    """A conversation as a template writes it.

    Attributes:
        text: The rendering.
        messages: The messages rendered.
        markers: The places of their strings in the text.
        tools: The numbers of the tools that the text names, from 0.
        all_marked: Whether the strings of other roles than the assistant were marked too.
    """

    text: str
    messages: Sequence[Message]
    markers: Sequence[Marker]
    tools: frozenset[int] = frozenset()
    all_marked: bool = True

    def shows(self, number: int, kind: int, within: Span | None = None) -> bool:
        """Whether a string of a message stands in the text, both its ends."""
        begin, end = within or (0, len(self.text))
        found = {
            m.is_begin for m in self.markers if m.owner == number and m.kind == kind and begin <= m.position <= end
        }
        return len(found) == 2

    def missing_from(self, turn: Turn, *, has_thought: bool = False) -> str | None:
        """Return what a turn should say and the template leaves out, in words; None if nothing.

        Args:
            turn: The turn.
            has_thought: Whether its thought is put before it otherwise.
        """
        number, message = turn.number, self.messages[turn.number]
        within, text = (turn.begin, turn.end), self.text[turn.begin : turn.end]
        thought, answer = thought_and_answer(message)
        if thought and not has_thought and not self.shows(number, THOUGHT, within):
            return "its thought"
        names = _called(message) if message.get("tool_calls") else []
        if names:
            own = [m for m in self.markers if m.owner == number and m.kind == ARGUMENT and turn.begin <= m.position]
            arguments = sum(m.is_begin for m in own if m.position <= turn.end)
            if any(text.count(name) < names.count(name) for name in names) or arguments < num_arguments(message):
                return "its call"
        if answer and not self.shows(number, CONTENT, within):
            return "what it says before its call" if names else "its words"
        return None


def rendering_of(
    text: str,
    messages: Sequence[Message],
    markers: Sequence[Marker],
    tools: list[Any] | None,
    options: Mapping[str, bool],
) -> Rendering:
    """Return a text with the places of its strings, as `marked` with some options left markers in it."""
    count, all_marked = len(messages), options.get("requests", True)
    own = [marker for marker in markers if marker.owner < count]
    named = {marker.owner - count for marker in markers if marker.owner >= count}
    if not all_marked:
        named = {number for number, tool in enumerate(tools or ()) if _tool_name(tool) in text}
    return Rendering(text, messages, own, frozenset(named), all_marked)


@dataclass(frozen=True)
class TurnFinder:
    """Finds the assistant's turns in a rendering.

    Attributes:
        rendering: The conversation.
        wording: What the template writes around turns.
        calls: How it takes calls.
        first_messages: Renders the first so many messages, with or without generation prompt (``prompt``); gives None
            if the template refuses them.
    """

    rendering: Rendering
    wording: Wording
    calls: CallForm | None
    first_messages: Callable[..., str | None]

    def turns(self, numbers: Sequence[int]) -> list[Turn]:
        """Return the turns of some messages, end tokens included.

        Raises:
            BadRow: If a turn is missing or cannot be told from its neighbours.
        """
        return [self._turn(number) for number in numbers]

    def _turn(self, number: int) -> Turn:
        markers = self.rendering.markers
        own = [at for at, marker in enumerate(markers) if marker.owner == number]
        if own:
            return self._marked_turn(number, own[0], own[-1])
        # Its string had a marker, so it should have left one in the text.
        message = self.rendering.messages[number]
        if (message.get("content") or "").strip():
            raise BadRow(f"message {number + 1} does not appear in what the chat template writes")
        return self._bare_turn(number)

    def _marked_turn(self, number: int, first: int, last: int) -> Turn:
        markers = self.rendering.markers
        begins, ends = markers[first], markers[last]
        # Another message's string inside the turn, or a string whose end the template dropped.
        if any(marker.owner != number for marker in markers[first:last]) or ends.is_begin:
            raise BadRow(AMBIGUOUS)
        # The turn lies somewhere between the strings of its neighbors.
        start = markers[first - 1].position if first else 0
        stop = markers[last + 1].position if last + 1 < len(markers) else len(self.rendering.text)
        begin, is_prompted = self._begin(number, start, begins)
        if is_prompted and number and self.rendering.messages[number - 1].get("role") == "tool":
            # Some templates write a turn behind a result otherwise than their prompt does.
            prompt = self.first_messages(number, prompt=True)
            is_prompted = prompt is None or self.rendering.text[:begin].endswith(prompt[-TAIL:])
        span = (begin, self._end(number, ends.position, stop))
        return Turn(number, (span,), self.whole_from(number, span), is_prompted)

    def _bare_turn(self, number: int) -> Turn:
        """Find a turn without any string to mark: an empty response, or a tool call without arguments."""
        markers = self.rendering.markers
        start = max((marker.position for marker in markers if marker.owner < number), default=0)
        later = (marker.position for marker in markers if marker.owner > number)
        stop = min(later, default=len(self.rendering.text))
        headers = (self.wording.header, self.wording.header_start)
        # The surest first: what the template writes for these very messages, then what it wrote for the probe.
        ways = [self._after_prompt(number, start, stop), self._after_request(start, stop)]
        ways += [self._after(header, self.rendering.text.find, start, stop) for header in headers]
        begin = _known(next((at for at in ways if at is not None), None))
        span = (begin, self._end(number, begin, stop))
        return Turn(number, (span,), self.whole_from(number, span))

    def whole_from(self, number: int, span: Span) -> int:
        """Return from which character on a turn that is cut is an answer, though a shorter one."""
        message = self.rendering.messages[number]
        if message.get("tool_calls"):
            return span[1]
        if not thought_and_answer(message)[0] or not self.rendering.shows(number, THOUGHT, span):
            return span[0]
        contents = (m for m in self.rendering.markers if m.owner == number and m.kind == CONTENT)
        return next((m.position for m in contents if span[0] <= m.position <= span[1]), span[1])

    def _begin(self, number: int, start: int, first: Marker) -> tuple[int, bool]:
        """Return where a turn begins, between the string before it and its own first string, and if it is prompted."""
        between = (start, first.position)
        begin = self._after_request(*between)
        if begin is None:  # the last one: an earlier one may be part of the request
            begin = self._after(self.wording.header, self.rendering.text.rfind, *between)
        if begin is not None:
            return begin, True
        # Nothing of the usual text: perhaps this template treats earlier turns, or this conversation, in another way.
        after_start = self._after(self.wording.header_start, self.rendering.text.rfind, *between)
        if after_start is None and (begin := self._after_prompt(number, *between)) is not None:
            return begin, True
        message = self.rendering.messages[number]
        content = message.get("content") or ""
        says_more = thought_and_answer(message)[0] or (message.get("tool_calls") and not content.strip())
        if after_start is not None and (says_more or not first.is_begin):
            return after_start, False  # the template writes something of its own before the string
        if says_more or not first.is_begin:
            raise BadRow(AMBIGUOUS)
        # No header at all: the turn begins with its string, whose leading white space is before the marker (`_wrap`),
        # unless the template trims it.
        leading = content[: len(content) - len(content.lstrip())]
        begin = first.position - len(leading) * self.rendering.text[start : first.position].endswith(leading)
        return begin, not self.wording.header.strip()

    def _after_request(self, start: int, stop: int) -> int | None:
        """Return the place after ``after_request``, which may follow white space."""
        between, wanted = self.rendering.text[start:stop], self.wording.after_request.lstrip()
        trimmed = between.lstrip()
        found = wanted and trimmed.startswith(wanted)
        return start + len(between) - len(trimmed) + len(wanted) if found else None

    def _after(self, header: str, find: Callable[..., int], start: int, stop: int) -> int | None:
        at = find(header, start, stop) if header.strip() else -1
        return at + len(header) if at >= 0 else None

    def _after_prompt(self, number: int, start: int, stop: int) -> int | None:
        prompt = self.first_messages(number, prompt=True)
        fits = prompt is not None and start <= len(prompt) <= stop and self.rendering.text.startswith(prompt)
        return len(prompt) if fits and prompt is not None else None

    def _end(self, number: int, position: int, stop: int) -> int:
        """Return where a turn ends, from the end of its last string to the begin of the next message's first."""
        text, message = self.rendering.text, self.rendering.messages[number]
        calls = bool(message.get("tool_calls"))
        ends = (*self.wording.ends, self.calls.end) if calls and self.calls and self.calls.end else self.wording.ends
        found = [at + len(end) for end in ends if (at := text.find(end, position, stop)) >= 0]
        if found:
            return min(found)  # a later end token is that of another turn
        if calls:  # a tool call may end in its own way
            return self._end_of_call(number, position, stop)
        content = message.get("content") or ""
        # A blank content's white space is before its marker.
        trailing = content[len(content.rstrip()) :] if content.strip() else ""
        return position + len(trailing) * text.startswith(trailing, position, stop)

    def _end_of_call(self, number: int, position: int, stop: int) -> int:
        """Return where the rendering up to this turn ends, or the last special token that it shares with the text."""
        alone = (self.first_messages(number + 1, prompt=False) or "").rstrip()
        # RUF071 warns that commonprefix compares characters, not parts of paths. Characters are meant.
        stop = min(stop, len(commonprefix([alone, self.rendering.text])))  # noqa: RUF071
        found = [token.end() for token in self.wording.special.finditer(self.rendering.text, position, stop)]
        if stop == len(alone) > position or found:
            return stop if stop == len(alone) else found[-1]
        raise BadRow(f"message {number + 1} calls a tool, and where the call ends cannot be told from what follows")


def _called(message: Message) -> list[str]:
    calls = message.get("tool_calls") or ()
    return [str((call.get("function") or call).get("name") or "") for call in calls if isinstance(call, Mapping)]


def _known(position: int | None) -> int:
    if position is None:
        raise BadRow(AMBIGUOUS)
    return position


def _tool_name(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    return str(function.get("name") or "") if isinstance(function, Mapping) else ""


# ---- Templates that mark their turns ----


def without_markers(marked: str, span: Span) -> Span:
    """Return where a stretch of a marked text lies in the text without markers."""
    begin, end = (edge - len(read_marks(marked[:edge])[1]) for edge in span)
    return begin, end


def by_message(rendering: Rendering, spans: Sequence[Span]) -> dict[int, list[Span]]:
    """Give stretches that the template marks to the messages whose strings lie in them."""
    numbers = [number for number, message in enumerate(rendering.messages) if message.get("role") == "assistant"]
    found: dict[int, list[Span]] = {}
    owner: int | None = None
    for begin, end in spans:
        owners = [m.owner for m in rendering.markers if begin <= m.position <= end and m.owner in numbers]
        inside = [m.owner for m in rendering.markers if begin < m.position < end and m.owner in numbers] or owners
        if inside and inside[0] not in found:
            owner = inside[0]
        # A stretch without a string: an end token marked apart, or a turn that says nothing.
        elif not inside:
            owner = owner if owner is not None and len(spans) != len(numbers) else _next(numbers, found)
        if owner is not None:
            found.setdefault(owner, []).append((begin, end))
    return found


def _next(numbers: Sequence[int], found: Mapping[int, Any]) -> int | None:
    return next((number for number in numbers if number not in found), None)
