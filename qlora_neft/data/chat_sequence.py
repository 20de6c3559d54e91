"""A sequence that a chat template makes of a conversation: which turns it trains, and what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .chat_markers import CONTENT, Span, thought_and_answer
from .chat_turns import Rendering, Turn
from .examples import BadRow, Piece

NO_CALL = "message {} calls a tool, and the chat template does not write the call"


@dataclass(frozen=True)
class Shown:
    """A rendering and what is trained of it.

    Attributes:
        rendering: The conversation, or the beginning of one.
        turns: The turns that are trained, in order.
        others: The assistant's other turns, as far as they can be told from the text around them.
        given: Text of a prompt and of a thought behind it, of a template that opens thoughts in its prompt and shows
            none afterwards; None where ``rendering`` is the text.
        answer: Where the rest of the turn stands in the rendering, with ``given``.
    """

    rendering: Rendering
    turns: list[Turn]
    others: list[Turn]
    given: tuple[str, str] | None = None
    answer: Span = (0, 0)

    @cached_property
    def _missing(self) -> dict[int, str | None]:
        """What each trained turn should say and the text leaves out, by the number of its message."""
        has_thought = self.given is not None
        return {turn.number: self.rendering.missing_from(turn, has_thought=has_thought) for turn in self.turns}

    def pieces(self) -> list[Piece]:
        """Return the text in pieces: trained, excluded, and the rest."""
        if self.given is None:
            return in_pieces(self.rendering.text, self.turns, self.others)
        prompt, thought = self.given
        written = self.rendering.text[slice(*self.answer)]
        return [Piece(prompt, False), Piece(thought + written, True, len(thought))]

    def hidden(self) -> list[int]:
        """Return the numbers of turns that lack something which the template may show once they are the last."""
        last = len(self.rendering.messages) - 1
        return [number for number, what in self._missing.items() if what == "its thought" or (what and number != last)]

    def left_out(self, num_tools: int) -> list[tuple[int, str]]:
        """Return what stands before a trained turn and not in the text.

        Args:
            num_tools: Number of tools that the row describes.

        Returns:
            The number of the message, -1 for tools, and what it is in words.

        Raises:
            BadRow: If it is trained itself, or a request or a tool's result, which the turn answers.
        """
        for number, missing in self._missing.items():
            _refuse(number, missing)
        return _context_left_out(self.rendering, self.turns[-1].number, num_tools)


def in_pieces(text: str, turns: Sequence[Turn], excluded: Sequence[Turn] = ()) -> list[Piece]:
    """Cut the text at the ends of responses; trained stretches that touch become one."""
    spans = [(begin, end, turn.whole_from, True) for turn in turns for begin, end in turn.spans]
    spans += [(begin, end, 0, False) for turn in excluded for begin, end in turn.spans]
    pieces: list[Piece] = []
    position = 0
    for begin, end, whole_from, trained in [*sorted(spans), (len(text), len(text), 0, True)]:
        begin = max(begin, position)  # the end token that extended one stretch may begin the next
        whole = max(0, min(whole_from, end) - begin)
        for piece in (Piece(text[position:begin], False), Piece(text[begin:end], trained, whole, not trained)):
            if piece.text:
                _add(pieces, piece)
        position = max(position, end)
    return pieces


def _add(pieces: list[Piece], piece: Piece) -> None:
    before = pieces[-1] if pieces else None
    if before is None or (before.trained, before.excluded) != (piece.trained, piece.excluded):
        pieces.append(piece)
        return
    whole = len(before.text) + piece.whole_from if piece.whole_from else before.whole_from
    pieces[-1] = Piece(before.text + piece.text, piece.trained, whole, piece.excluded)


def _refuse(number: int, missing: str | None) -> None:
    if missing == "its call":
        raise BadRow(NO_CALL.format(number + 1))
    if missing:
        raise BadRow(f"message {number + 1}: the chat template leaves out {missing}")


def _context_left_out(rendering: Rendering, last: int, num_tools: int) -> list[tuple[int, str]]:
    """Return what stands before a trained turn and not in the text: the number of its message, -1 for tools, in words.

    Raises:
        BadRow: If it is a request or a tool's result, which the turn answers.
    """
    found = [(-1, f"tool {number + 1}") for number in range(num_tools) if number not in rendering.tools]
    found = [(-1, "the tools")] if len(found) == num_tools > 0 else found
    for number, message in enumerate(rendering.messages[:last]):
        role, content = message.get("role"), (message.get("content") or "").strip()
        answer = thought_and_answer(message)[1] if role == "assistant" else content
        if not answer or rendering.shows(number, CONTENT):
            continue
        if not rendering.all_marked and (role == "assistant" or content in rendering.text):
            continue
        if rendering.all_marked and role in ("user", "tool"):
            raise BadRow(f"message {number + 1} ({role}) does not appear in what the chat template writes")
        found.append((number, f"message {number + 1} ({role})"))
    return found
