"""Find the assistant's stretches of a rendered conversation, with the help of characters that texts do not contain.

Rendering the first messages of a conversation does not always give the beginning of its rendering: templates trim
contents, drop the reasoning of earlier turns, move the system message. So the messages are rendered once more with a
private-use character at either end of their strings. Where these land, the strings land, whatever else the text says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from .examples import BadRow, Message

Span = tuple[int, int]
FIRST = 0x100000  # private use, plane 16; two characters to a message. Icon fonts use plane 15.
MARKER = re.compile("[\U00100000-\U0010ffff]")
# Names that templates have for an assistant's reasoning.
REASONING = ("reasoning_content", "thinking", "reasoning")
AMBIGUOUS = (
    "the chat template rewrites this conversation so that its responses cannot be told apart; "
    "set data.prompt_template to a Jinja file that marks them with {% generation %}"
)


@dataclass(frozen=True)
class Wording:
    """The text a template writes around every turn.

    Attributes:
        after_request: From the end of a request to where its response is generated.
        header: The part of ``after_request`` that ``add_generation_prompt=True`` adds; may be empty.
        header_start: The part of the header that also precedes responses of earlier turns.
        ends: The special tokens after a response, mostly one, beginning with those after the last response.
        special: Matches any special token of the tokenizer.
    """

    after_request: str
    header: str
    header_start: str
    ends: tuple[str, ...]
    special: re.Pattern[str]


@dataclass(frozen=True)
class Marker:
    """A marker's place in the rendering, the number of its message, and at which end of a string it was."""

    position: int
    owner: int
    is_begin: bool


def mark(messages: Sequence[Message], *, blanks: bool = True, requests: bool = True) -> list[dict]:
    """Return messages with markers around their strings.

    Args:
        messages: Messages whose contents are strings, None or missing.
        blanks: Whether to mark contents of nothing but white space; a template that tests for blank contents then
            takes another branch.
        requests: Whether to mark messages of other roles than the assistant.
    """
    # Plane 16 has 0x10000 characters, and a message takes two.
    if len(messages) > 0x8000:
        raise BadRow("has more than 32,768 messages")
    pairs = ((chr(first), chr(first + 1)) for first in range(FIRST, FIRST + 2 * len(messages), 2))
    return [
        _mark_message(message, pair, blanks) if requests or message.get("role") == "assistant" else dict(message)
        for message, pair in zip(messages, pairs, strict=True)
    ]


def read_marks(marked: str) -> tuple[str, list[Marker]]:
    """Return a rendering without its markers, and the markers in the order of the text."""
    markers = []
    for number, found in enumerate(MARKER.finditer(marked)):
        # Two characters to a message: the even one begins a string, the odd one ends it.
        owner, is_end = divmod(ord(found.group()) - FIRST, 2)
        markers.append(Marker(found.start() - number, owner, not is_end))  # the text loses those before it too
    return MARKER.sub("", marked), markers


@dataclass(frozen=True)
class TurnFinder:
    """Finds the assistant's turns in a rendering.

    Attributes:
        text: The rendering.
        messages: The messages rendered.
        markers: The places of their strings in the text.
        wording: What the template writes around turns.
        first_messages: Renders the first so many messages, with or without generation prompt (``prompt``); gives None
            if the template refuses them.
    """

    text: str
    messages: Sequence[Message]
    markers: Sequence[Marker]
    wording: Wording
    first_messages: Callable[..., str | None]

    def spans(self) -> list[Span]:
        """Return the character ranges of the assistant's turns, end tokens included.

        Raises:
            BadRow: If a turn is missing or cannot be told from its neighbours.
        """
        numbers = [number for number, message in enumerate(self.messages) if message.get("role") == "assistant"]
        spans = [self._turn(number) for number in numbers]
        # Turns that overlap: a piece of one was taken for the other.
        if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
            raise BadRow(AMBIGUOUS)
        for number, (begin, end) in zip(numbers, spans, strict=True):
            # A template without a place for calls drops them silently, and the turn would teach to answer with nothing.
            if any(name not in self.text[begin:end] for name in _called(self.messages[number])):
                raise BadRow(f"message {number + 1} calls a tool, and the chat template does not write the call")
        return spans

    def _turn(self, number: int) -> Span:
        own = [at for at, marker in enumerate(self.markers) if marker.owner == number]
        if own:
            return self._marked_turn(number, own[0], own[-1])
        # Its string had a marker, so it should have left one in the text.
        if (self.messages[number].get("content") or "").strip():
            raise BadRow(f"message {number + 1} does not appear in what the chat template writes")
        return self._bare_turn(number)

    def _marked_turn(self, number: int, first: int, last: int) -> Span:
        begins, ends = self.markers[first], self.markers[last]
        # Another message's string inside the turn, or a string whose end the template dropped.
        if any(marker.owner != number for marker in self.markers[first:last]) or ends.is_begin:
            raise BadRow(AMBIGUOUS)
        # The turn lies somewhere between the strings of its neighbors.
        start = self.markers[first - 1].position if first else 0
        stop = self.markers[last + 1].position if last + 1 < len(self.markers) else len(self.text)
        return self._begin(number, start, begins), self._end(number, ends.position, stop)

    def _bare_turn(self, number: int) -> Span:
        """Find a turn without any string to mark: an empty response, or a tool call without arguments."""
        start = max((marker.position for marker in self.markers if marker.owner < number), default=0)
        later = (marker.position for marker in self.markers if marker.owner > number)
        stop = min(later, default=len(self.text))
        headers = (self.wording.header, self.wording.header_start)
        # The surest first: what the template writes for these very messages, then what it wrote for the probe.
        ways = [self._after_prompt(number, start, stop), self._after_request(start, stop)]
        ways += [self._after(header, self.text.find, start, stop) for header in headers]
        begin = _known(next((at for at in ways if at is not None), None))
        return begin, self._end(number, begin, stop)

    def _begin(self, number: int, start: int, first: Marker) -> int:
        """Return where a turn begins, between the string before it and its own first string."""
        between = (start, first.position)
        begin = self._after_request(*between)
        if begin is None:  # the last one: an earlier one may be part of the request
            begin = self._after(self.wording.header, self.text.rfind, *between)
        if begin is not None:
            return begin
        # Nothing of the usual text: perhaps this template treats earlier turns, or this conversation, in another way.
        after_start = self._after(self.wording.header_start, self.text.rfind, *between)
        if after_start is None and (begin := self._after_prompt(number, *between)) is not None:
            return begin
        message, content = self.messages[number], self.messages[number].get("content") or ""
        thinks = "</think>" in content or any(message.get(key) for key in REASONING)
        if thinks or not first.is_begin or (message.get("tool_calls") and not content.strip()):
            return _known(after_start)  # the template writes something of its own before the string
        # No header at all: the turn begins with its string, whose leading white space is before the marker (`_wrap`),
        # unless the template trims it.
        leading = content[: len(content) - len(content.lstrip())]
        return first.position - len(leading) * self.text[start : first.position].endswith(leading)

    def _after_request(self, start: int, stop: int) -> int | None:
        """Return the place after ``after_request``, which may follow white space."""
        between, wanted = self.text[start:stop], self.wording.after_request.lstrip()
        trimmed = between.lstrip()
        found = wanted and trimmed.startswith(wanted)
        return start + len(between) - len(trimmed) + len(wanted) if found else None

    def _after(self, header: str, find: Callable[..., int], start: int, stop: int) -> int | None:
        at = find(header, start, stop) if header.strip() else -1
        return at + len(header) if at >= 0 else None

    def _after_prompt(self, number: int, start: int, stop: int) -> int | None:
        prompt = self.first_messages(number, prompt=True)
        fits = prompt is not None and start <= len(prompt) <= stop and self.text.startswith(prompt)
        return len(prompt) if fits else None

    def _end(self, number: int, position: int, stop: int) -> int:
        """Return where a turn ends, from the end of its last string to the begin of the next message's first."""
        found = [at + len(end) for end in self.wording.ends if (at := self.text.find(end, position, stop)) >= 0]
        if found:
            return min(found)  # a later end token is that of another turn
        if self.messages[number].get("tool_calls"):  # a tool call may end in its own way
            return self._end_of_call(number, position, stop)
        content = self.messages[number].get("content") or ""
        # A blank content's white space is before its marker.
        trailing = content[len(content.rstrip()) :] if content.strip() else ""
        return position + len(trailing) * self.text.startswith(trailing, position, stop)

    def _end_of_call(self, number: int, position: int, stop: int) -> int:
        """Return where the rendering up to this turn ends, or the last special token that it shares with the text."""
        alone = (self.first_messages(number + 1, prompt=False) or "").rstrip()
        # RUF071 warns that commonprefix compares characters, not parts of paths. Characters are meant.
        stop = min(stop, len(commonprefix([alone, self.text])))  # noqa: RUF071
        found = [token.end() for token in self.wording.special.finditer(self.text, position, stop)]
        if stop == len(alone) > position or found:
            return stop if stop == len(alone) else found[-1]
        raise BadRow("calls a tool, and the chat template writes no token after the call that says where it ends")


def _known(position: int | None) -> int:
    if position is None:
        raise BadRow(AMBIGUOUS)
    return position


def _mark_message(message: Message, pair: tuple[str, str], blanks: bool) -> dict[str, Any]:
    marked = dict(message)
    content = message.get("content")
    # Most templates break lines depending on whether a call comes with words: never turn no words into some.
    if isinstance(content, str) and (content.strip() or (blanks and not message.get("tool_calls"))):
        marked["content"] = _wrap(content, pair)
    if message.get("role") == "assistant":
        marked |= {key: _wrap_all(message[key], pair) for key in REASONING if message.get(key)}
        if isinstance(message.get("tool_calls"), Sequence):
            marked["tool_calls"] = [_mark_call(call, pair) for call in message["tool_calls"]]
    return marked


def _mark_call(call: Any, pair: tuple[str, str]) -> Any:
    """Mark a tool call's arguments; not its id, whose length templates test, nor its name, which results repeat."""
    if not isinstance(call, Mapping):
        return call
    marked = dict(call)
    if "function" in call:
        marked["function"] = _mark_call(call["function"], pair)
    if "arguments" in call:
        marked["arguments"] = _wrap_all(call["arguments"], pair)
    return marked


def _wrap_all(value: Any, pair: tuple[str, str]) -> Any:
    if isinstance(value, str):
        return _wrap(value, pair) if value.strip() else value
    if isinstance(value, Mapping):
        return {key: _wrap_all(item, pair) for key, item in value.items()}
    return [_wrap_all(item, pair) for item in value] if isinstance(value, list) else value


def _wrap(text: str, pair: tuple[str, str]) -> str:
    """Put markers inside the outer white space, so that a template that trims leaves the same text as without them."""
    begin, end = pair
    core = text.strip()
    leading = len(text) - len(text.lstrip())
    if "</think>" in core:  # templates cut here and write what follows
        core = re.sub(r"(</think>\s*)(?=\S)", lambda found: found.group() + begin, core)
    return text[:leading] + begin + core + end + text[leading + len(text.strip()) :]


def _called(message: Message) -> list[str]:
    calls = message.get("tool_calls") or ()
    return [str((call.get("function") or call).get("name") or "") for call in calls if isinstance(call, Mapping)]
