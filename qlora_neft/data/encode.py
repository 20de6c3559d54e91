"""Turn pieces of text into token ids, and decide which of them are trained.

A sequence's text is tokenized as a whole, as in the papers' code, and a token is trained if it begins inside a trained
piece. If a token would reach across the beginning of a response, the text is cut there and both sides are tokenized
separately, so that generation starts from exactly the prompt that training saw. With a tokenizer that would then put a
space between them (SentencePiece) the token stays, untrained: part of it is prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..steps import IGNORE_INDEX
from .examples import Piece

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """One sequence.

    Attributes:
        ids: Token ids, int32 (L,).
        trained: Whether each token is trained, bool (L,).
        crossed: None, unless a token would have reached across the beginning of a response: ``"cut apart"`` if the
            text was cut there, ``"across"`` if the token was kept and not trained, as cutting would change the text.
    """

    ids: np.ndarray
    trained: np.ndarray
    crossed: str | None = None

    def num_trained(self) -> int:
        """Count the trained tokens as a causal LM does: nothing predicts the first token."""
        return int(self.trained[1:].sum())

    def labels(self) -> np.ndarray:
        """Return the ids where trained and -100 elsewhere, int32 (L,)."""
        return np.where(self.trained, self.ids, np.int32(IGNORE_INDEX))


class Encoder:
    """Tokenizes sequences of pieces.

    Args:
        tokenizer: A Hugging Face tokenizer.
        adds_special_tokens: Whether the tokenizer has to add its begin token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, adds_special_tokens: bool) -> None:
        self.tokenizer, self.adds_special_tokens = tokenizer, adds_special_tokens
        self._joins = joins_cleanly(tokenizer)

    def encode(self, sequences: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """Tokenize sequences, each of at least one piece."""
        if not self.tokenizer.is_fast:  # it gives no offsets, so pieces are tokenized one by one
            return [self._apart([(p.text, p.trained) for p in pieces], cut=False) for pieces in sequences]
        texts = ["".join(piece.text for piece in pieces) for pieces in sequences]
        if not texts:
            return []
        encodings = self._tokenize(texts).encodings
        assert encodings is not None  # every fast tokenizer's
        return [self._encoded(p, t, e) for p, t, e in zip(sequences, texts, encodings, strict=True)]

    def lengths(self, sequences: Sequence[Sequence[Piece]]) -> list[int]:
        """Return the number of tokens of each sequence."""
        return [len(encoded.ids) for encoded in self.encode(sequences)]

    def _tokenize(self, texts: list[str]) -> BatchEncoding:
        # Not verbose: it would warn of texts longer than the model's context, which are cut or split later.
        return self.tokenizer(
            texts, add_special_tokens=self.adds_special_tokens, return_attention_mask=False, verbose=False
        )

    def _encoded(self, pieces: Sequence[Piece], text: str, encoding: Any) -> Encoded:
        ids, offsets = _without_added_end(encoding.ids, encoding.offsets)
        starts, ends = _ranges(text, offsets)
        bounds = _bounds(pieces)
        # A token reaches across if it has characters on both sides. Nothing is before a response that begins the text.
        crossed = any(((starts < begin) & (begin < ends)).any() for begin, _ in bounds if begin)
        if self._joins and (crossed or any(_may_differ(text, begin) for begin, _ in bounds)):
            return self._apart(_cut(text, bounds), cut=crossed)
        trained = np.zeros(len(ids), dtype=bool)
        for begin, end in bounds:
            # A token belongs where it begins. One without text, such as a begin token, is never trained.
            trained |= (starts >= begin) & (starts < end) & (ends > starts)
        return Encoded(np.asarray(ids, dtype=np.int32), trained, "across" if crossed else None)

    def _apart(self, parts: list[tuple[str, bool]], *, cut: bool) -> Encoded:
        """Tokenize stretches of text one by one, each given with whether it is trained."""
        ids: list[int] = []
        trained: list[bool] = []
        for number, (text, is_trained) in enumerate(parts):
            begin, found = self._part(text, is_first=number == 0)
            ids += begin + found
            trained += [False] * len(begin) + [is_trained] * len(found)
        return Encoded(np.asarray(ids, dtype=np.int32), np.asarray(trained, dtype=bool), "cut apart" if cut else None)

    def _part(self, text: str, *, is_first: bool) -> tuple[list[int], list[int]]:
        """Return what the tokenizer adds before the text, and the text's own tokens."""
        own = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not (is_first and self.adds_special_tokens):
            return [], own
        # Only what is put before the text: the begin token, if there is one.
        added = self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        return added[: _find(own, added)], own


def joins_cleanly(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether texts tokenized separately decode as one: SentencePiece tokenizers put a space before each."""
    ids = [i for text in ("ab", "cd") for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return tokenizer.decode(ids) == "abcd"


def cut_to_length(encoded: Encoded, max_length: int, *, keep_end_token: bool) -> tuple[Encoded, bool]:
    """Cut a sequence to ``max_length`` tokens.

    If the cut is inside a response, its last place goes to the response's end token, unless that is not to be kept. If
    the cut is in the request after a response, nothing of that request is left.

    Returns:
        The sequence, and whether trained tokens were lost.
    """
    if len(encoded.ids) <= max_length:
        return encoded, False
    lost = bool(encoded.trained[max_length:].any())
    ids, trained = encoded.ids[:max_length], encoded.trained[:max_length]
    if not lost:
        return Encoded(ids, trained, encoded.crossed), False
    # Trained on both sides of the cut. Otherwise it falls on the edge of a response, or in a request.
    inside_response = trained[-1] and encoded.trained[max_length]
    if inside_response and keep_end_token:
        if max_length >= 2 and not trained[-2]:  # only the end token of this response would be left
            return _up_to_last_trained(Encoded(ids[:-1], trained[:-1], encoded.crossed)), True
        # The end token of this very response: templates may end turns in several ways.
        ids = np.concatenate([ids[:-1], encoded.ids[[_end_of_stretch(encoded.trained, max_length)]]])
        return Encoded(ids, trained, encoded.crossed), True
    # A request whose response is gone would be computed for nothing.
    return _up_to_last_trained(Encoded(ids, trained, encoded.crossed)), True


def _up_to_last_trained(encoded: Encoded) -> Encoded:
    last = np.flatnonzero(encoded.trained)
    stop = int(last[-1]) + 1 if len(last) else 0
    return Encoded(encoded.ids[:stop], encoded.trained[:stop], encoded.crossed)


def _end_of_stretch(trained: np.ndarray, inside: int) -> int:
    """Return the index of the last token of the trained stretch around index ``inside``."""
    after = np.flatnonzero(~trained[inside:])
    return inside + int(after[0]) - 1 if len(after) else len(trained) - 1


def _bounds(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Return the character ranges of the trained pieces."""
    found, position = [], 0
    for piece in pieces:
        if piece.trained and piece.text:
            found.append((position, position + len(piece.text)))
        position += len(piece.text)
    return found


def _cut(text: str, bounds: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """Cut the text at both ends of every trained piece; return the parts, each with whether it is trained."""
    edges = sorted({0, len(text), *(edge for bound in bounds for edge in bound)})
    begins = {begin for begin, _ in bounds}
    return [(text[a:b], a in begins) for a, b in pairwise(edges)]


def _ranges(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return where each token begins and ends in the text, int64 (L,) each.

    Byte-level tokenizers may trim offsets: a token's range then excludes the spaces before its word, and a token of
    only spaces has an empty range. Spaces in no token's range are given to the token after them.
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T.copy()
    # (L,), the furthest that any earlier token reaches.
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
    for i in np.flatnonzero(starts > before):
        if text[before[i] : starts[i]].isspace():
            starts[i] = before[i]
    return starts, ends


def _may_differ(text: str, begin: int) -> bool:
    """Tell whether the text before a place may be tokenized differently if what follows is missing.

    No token need reach across the place for that: pre-tokenizers give the last of several spaces to the word after
    them, and merges depend on the whole of a word, a number or a run of punctuation.
    """
    if begin == 0 or begin == len(text):
        return False
    before, after = text[begin - 1], text[begin]
    if before.isspace():
        return after.isspace() or (begin > 1 and text[begin - 2].isspace())
    return not after.isspace() and before.isalnum() == after.isalnum()


def _without_added_end(ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Drop what the tokenizer adds at the end of its own accord: the text has its end token already."""
    count = len(ids)
    while count and offsets[count - 1] == (0, 0):
        count -= 1
    return ids[:count], offsets[:count]


def _find(part: list[int], whole: list[int]) -> int:
    """Return where a list occurs in another, 0 if nowhere."""
    starts = range(len(whole) - len(part) + 1)
    return next((start for start in starts if whole[start : start + len(part)] == part), 0)
