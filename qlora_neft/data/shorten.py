"""Leave out the middle of pieces far longer than any sequence, before they are tokenized.

Memory and time then follow what is kept of a row, not what it holds. What is kept is what would have been kept: of a
piece that is left whole at both ends, only tokens near its ends are ever used, since a sequence or a part of it is cut
to the first so many tokens and the last one. A cut may change the tokens close to it, so the beginning that stays must
hold more tokens than any cut keeps, also if it goes on differently; where that cannot be shown, the piece stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .examples import Piece

Tokenize = Callable[[str], list[int]]

CHARACTERS_PER_TOKEN = 8  # of the first try; common text has 3 to 5
LEAST = 2048  # characters of a beginning
TAIL = 1024  # characters of the end that stay
SEAM = 32  # tokens at a cut that may be others than in the whole text
FURTHER = 997  # characters by which a beginning is continued, to see whether its tokens stay
NEAR = 256  # characters in which a space is looked for to cut at


def shortened(pieces: Sequence[Piece], most: int, tokenize: Tokenize) -> list[Piece]:
    """Return the pieces, those that are far longer than needed without their middle.

    Args:
        pieces: A sequence.
        most: The largest number of tokens that is kept of a piece.
        tokenize: From a text to its token ids, without special tokens added.
    """
    return [_shortened(piece, most, tokenize) for piece in pieces]


def is_long(pieces: Sequence[Piece], most: int) -> bool:
    """Tell whether `shortened` would do anything."""
    return any(len(piece.text) > 2 * (_first_try(most) + TAIL) for piece in pieces)


def _first_try(most: int) -> int:
    return LEAST + CHARACTERS_PER_TOKEN * most


def _shortened(piece: Piece, most: int, tokenize: Tokenize) -> Piece:
    text, length = piece.text, _first_try(most)
    while len(text) > 2 * (length + TAIL):
        begin = _at_a_space(text, length)
        if _stays(text, begin, most, tokenize):
            end = _at_a_space(text, len(text) - TAIL)
            # What must not be ended before a place in the middle must not be ended in the beginning.
            whole_from = min(piece.whole_from, begin) if piece.whole_from < end else piece.whole_from - end + begin
            return replace(piece, text=text[:begin] + text[end:], whole_from=whole_from)
        length *= 4
    return piece


def _stays(text: str, end: int, most: int, tokenize: Tokenize) -> bool:
    """Tell whether the beginning of a text holds enough tokens, and the same ones if it goes on."""
    ids, further = tokenize(text[:end]), tokenize(text[: end + FURTHER])
    kept = len(ids) - SEAM
    return kept > most and ids[:kept] == further[:kept]


def _at_a_space(text: str, place: int) -> int:
    """Return the place of a space shortly before a place; the place itself if there is none."""
    found = max(text.rfind(" ", place - NEAR, place), text.rfind("\n", place - NEAR, place))
    return found if found > 0 else place
