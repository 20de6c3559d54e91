"""Turn pieces of text into token ids, and decide which of them are trained.

A sequence's text is tokenized as a whole, and a token is trained if it begins inside a trained piece. If a token would
reach across the beginning of a response, the text is cut there and both sides are tokenized separately, so that
generation starts from exactly the prompt that training saw.

SentencePiece tokenizers write a space and the word after it as one token. With these, spaces that end a prompt are the
response's: `Encoder.prompt_ids` leaves them out as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..steps import IGNORE_INDEX
from .examples import Piece
from .shorten import is_long, shortened

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_ANCHOR = "\n"
AT_ONCE = 2**20  # characters; a tokenizer keeps a few hundred bytes a token until a batch is done


@dataclass(frozen=True)
class Encoded:
    """One sequence.

    Attributes:
        ids: Token ids, int32 (L,).
        trained: Whether each token is trained, bool (L,).
        crossed: None, unless a token would have reached across the beginning of a response: ``"cut apart"`` if the
            text was cut there, ``"space"`` if a space that ends the prompt became the response's, ``"across"`` if the
            token was kept and not trained, as cutting would change the text.
        excluded: Whether each token is of a response that its row takes the loss off, bool (L,); None if no token is.
        weights: How much each token counts in the loss, float32 (L,); None for 1 where ``trained``, else 0.
        unfinished: Whether an end token must not stand in the place of a token, bool (L,): what is before it is half a
            thought or half a call; None if it may anywhere.
    """

    ids: np.ndarray
    trained: np.ndarray
    crossed: str | None = None
    excluded: np.ndarray | None = None
    weights: np.ndarray | None = None
    unfinished: np.ndarray | None = None

    def num_trained(self) -> int:
        """Count the trained tokens as a causal LM does: nothing predicts the first token."""
        return int(np.count_nonzero(self.trained[1:]))

    def labels(self) -> np.ndarray:
        """Return the ids where trained and -100 elsewhere, int32 (L,)."""
        return np.where(self.trained, self.ids, np.int32(IGNORE_INDEX))

    def loss_weights(self) -> np.ndarray:
        """Return how much each token counts in the loss, float32 (L,)."""
        return self.trained.astype(np.float32) if self.weights is None else self.weights

    def digest(self) -> bytes:
        """Return 16 bytes of BLAKE2 over all that is learned from: the ids, and how much each counts in the loss."""
        found = hashlib.blake2b(f"{len(self.ids)} ".encode(), digest_size=16)
        for array in (self.ids, self.trained, self.weights):
            if array is not None:
                found.update(array.tobytes())
        return found.digest()

    def at(self, kept: slice | np.ndarray) -> Encoded:
        """Return the tokens at some places alone; weights are given to what is left of a sequence."""
        excluded = None if self.excluded is None else self.excluded[kept]
        unfinished = None if self.unfinished is None else self.unfinished[kept]
        return Encoded(self.ids[kept], self.trained[kept], self.crossed, excluded, unfinished=unfinished)


class _Response(NamedTuple):
    """The characters of a response, whether the loss is taken on it, and the first of them before which it may end."""

    begin: int
    end: int
    trained: bool
    whole_from: int


class Encoder:
    """Tokenizes sequences of pieces.

    Args:
        tokenizer: A Hugging Face tokenizer.
        adds_special_tokens: Whether the tokenizer has to add its begin token.
        most: The largest number of tokens that is kept of a sequence or of a piece, None if all are: the middle of
            pieces far longer than that is left out, see `shorten`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, adds_special_tokens: bool, most: int | None = None
    ) -> None:
        self.tokenizer, self.adds_special_tokens, self.most = tokenizer, adds_special_tokens, most
        self._joins = joins_cleanly(tokenizer)
        self.begin = added_begin(tokenizer) if adds_special_tokens else None

    def encode(self, sequences: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """Tokenize sequences, each of at least one piece, with no more of a text at once than `AT_ONCE`.

        A begin token that a text spells out is not added again.
        """
        if self.begin is not None:
            sequences = [_without_begin(pieces, self.begin) for pieces in sequences]
        most = self.most
        if most is not None:
            sequences = [shortened(p, most, self._own) if is_long(p, most) else p for p in sequences]
        found: list[Encoded] = []
        for group in _groups(sequences):
            found += self._encode(group)
        return found

    def _own(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode(self, sequences: Sequence[Sequence[Piece]]) -> list[Encoded]:
        texts = ["".join(piece.text for piece in pieces) for pieces in sequences]
        if not self.tokenizer.is_fast:  # it gives no offsets
            return [self._by_prefixes(text, pieces) for text, pieces in zip(texts, sequences, strict=True)]
        if not texts:
            return []
        found = self._tokenize(texts)
        assert found.encodings is not None  # every fast tokenizer's
        # Each encoding would make a new list of its ids; here they are already.
        ids = found["input_ids"]
        return [self._encoded(*each) for each in zip(sequences, texts, ids, found.encodings, strict=True)]

    def lengths(self, sequences: Sequence[Sequence[Piece]]) -> list[int]:
        """Return the number of tokens of each sequence."""
        return [len(encoded.ids) for encoded in self.encode(sequences)]

    def prompt_ids(self, pieces: Sequence[Piece]) -> list[int]:
        """Return the token ids of a text that a response follows, as they stand before it in training."""
        if not self._joins:  # the spaces that end it are the response's
            *before, last = pieces
            pieces = [*before, replace(last, text=last.text.rstrip(" "))]
        [encoded] = self.encode([pieces])
        return encoded.ids.tolist()

    def _tokenize(self, texts: list[str]) -> BatchEncoding:
        # Not verbose: it would warn of texts longer than the model's context, which are cut or split later.
        return self.tokenizer(
            texts,
            add_special_tokens=self.adds_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )

    def _encoded(self, pieces: Sequence[Piece], text: str, ids: list[int], encoding: Any) -> Encoded:
        ids, offsets = _without_added_end(ids, encoding.offsets)
        starts, ends = _ranges(text, offsets)
        responses = _responses(pieces)
        moved = False
        if not self._joins:
            responses, moved = _with_spaces_before(text, responses)
        # A token reaches across if it has characters on both sides. Nothing is before a response that begins the text.
        crossed = [r.begin for r in responses if r.begin and ((starts < r.begin) & (r.begin < ends)).any()]
        if self._joins and (crossed or any(_may_differ(text, r.begin) for r in responses)):
            return self._apart(_cut(text, responses), cut=bool(crossed))
        mark = "space" if moved else None
        if crossed:
            apart = self._continued(text, crossed)
            mark = "cut apart" if apart else "across"
            ids, starts, ends = apart or (ids, starts, ends)
        return _marked(np.asarray(ids, dtype=np.int32), starts, ends, responses, mark)

    def _continued(self, text: str, cuts: Sequence[int]) -> tuple[list[int], np.ndarray, np.ndarray] | None:
        """Tokenize the text cut at some places, without the space that the tokenizer puts before each part.

        Returns:
            Token ids and the characters each covers; None if the parts cannot be tokenized so.
        """
        edges = [0, *cuts, len(text)]
        ids: list[int] = []
        ranges: list[tuple[np.ndarray, np.ndarray]] = []
        for begin, end in pairwise(edges):
            # Behind a newline, which no word merges with, a part is tokenized as in the middle of a text.
            before = "" if begin == 0 else _ANCHOR
            whole = self._tokenize([before + text[begin:end]])
            assert whole.encodings is not None  # fast
            found, offsets = _without_added_end(whole.encodings[0].ids, whole.encodings[0].offsets)
            starts, ends = _ranges(before + text[begin:end], offsets)
            first = 0 if begin == 0 else int((ends <= len(before)).sum())  # the newline's, and a begin token
            if begin and starts[first : first + 1].tolist() != [len(before)]:
                return None
            ids += found[first:]
            ranges.append((starts[first:] + begin - len(before), ends[first:] + begin - len(before)))
        starts, ends = (np.concatenate(side) for side in zip(*ranges, strict=True))
        return ids, starts, ends

    def _by_prefixes(self, text: str, pieces: Sequence[Piece]) -> Encoded:
        """Tokenize without offsets: where a response begins and ends is told by the tokens of the text before it."""
        responses = _responses(pieces)
        if self._joins:
            return self._apart(_cut(text, responses), cut=False)
        responses, moved = _with_spaces_before(text, responses)
        added, own = self._part(text, is_first=True)
        found: list[_Response] = []
        for response in responses:
            begin, end = self._prefix(own, text[: response.begin]), self._prefix(own, text[: response.end])
            if begin is None or end is None:  # a token reaches across: each part by itself
                return self._apart(_cut(text, responses), cut=True)
            whole_from = self._prefix(own, text[: response.whole_from])
            # Where a token holds both sides, the whole of it is on the safe one.
            found.append(response._replace(begin=begin, end=end, whole_from=end if whole_from is None else whole_from))
        ids = np.asarray(added + own, dtype=np.int32)
        at = np.arange(len(ids)) - len(added)  # (L,), below 0 for what the tokenizer adds
        return _marked(ids, at, at + 1, found, "space" if moved else None)

    def _prefix(self, ids: list[int], text: str) -> int | None:
        """Return the number of tokens of a text that the ids begin with, None if they begin otherwise."""
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        return len(found) if ids[: len(found)] == found else None

    def _apart(self, parts: list[Piece], *, cut: bool) -> Encoded:
        """Tokenize stretches of text one by one."""
        ids: list[int] = []
        counts: list[int] = []
        for number, part in enumerate(parts):
            added, found = self._part(part.text, is_first=number == 0)
            ids += added + found
            counts += [len(added)] * (number == 0) + [len(found)]
        ends = np.cumsum(counts)
        # What the tokenizer adds comes before the first part; the places of tokens stand in for those of characters.
        at = np.arange(len(ids))
        found = [
            _Response(int(end) - count, int(end), part.trained, self._place_in(part, int(end) - count))
            for part, count, end in zip(parts, counts[1:], ends[1:], strict=True)
            if part.trained or part.excluded
        ]
        return _marked(np.asarray(ids, dtype=np.int32), at, at + 1, found, "cut apart" if cut else None)

    def _place_in(self, part: Piece, begin: int) -> int:
        """Return the place before which a part that begins at a place must not be ended, in tokens."""
        if not part.whole_from:
            return begin
        return begin + len(self._part(part.text[: part.whole_from], is_first=False)[1])

    def _part(self, text: str, *, is_first: bool) -> tuple[list[int], list[int]]:
        """Return what the tokenizer adds before the text, and the text's own tokens."""
        own = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not (is_first and self.adds_special_tokens):
            return [], own
        # Only what is put before the text: the begin token, if there is one.
        added = self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        return added[: _find(own, added)], own


def added_begin(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the begin token, if the tokenizer puts it before a text."""
    ids = tokenizer("a")["input_ids"]
    return str(tokenizer.bos_token) if tokenizer.bos_token is not None and ids[0] == tokenizer.bos_token_id else None


def _without_begin(pieces: Sequence[Piece], begin: str) -> Sequence[Piece]:
    first = pieces[0]
    if not first.text.startswith(begin) or first.text == begin:
        return pieces
    return [replace(first, text=first.text.removeprefix(begin)), *pieces[1:]]


def _groups(sequences: Sequence[Sequence[Piece]]) -> Iterator[Sequence[Sequence[Piece]]]:
    """Divide sequences into groups of so much text that the tokenizer's records of them fit in memory."""
    begin, size = 0, 0
    for number, pieces in enumerate(sequences):
        length = sum(len(piece.text) for piece in pieces)
        if number > begin and size + length > AT_ONCE:
            yield sequences[begin:number]
            begin, size = number, 0
        size += length
    if begin < len(sequences):
        yield sequences[begin:]


def joins_cleanly(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether texts tokenized separately decode as one: SentencePiece tokenizers put a space before each."""
    ids = [i for text in ("ab", "cd") for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return tokenizer.decode(ids) == "abcd"


def _responses(pieces: Sequence[Piece]) -> list[_Response]:
    found, position = [], 0
    for piece in pieces:
        if (piece.trained or piece.excluded) and piece.text:
            whole_from = position + piece.whole_from
            found.append(_Response(position, position + len(piece.text), piece.trained, whole_from))
        position += len(piece.text)
    return found


def _with_spaces_before(text: str, responses: Sequence[_Response]) -> tuple[list[_Response], bool]:
    """Let each response begin with the spaces before it; return them, and whether any was moved."""
    found: list[_Response] = []
    for response in responses:
        least = found[-1].end if found else 0
        begin = max(least, len(text[: response.begin].rstrip(" ")))
        found.append(response._replace(begin=begin))
    return found, any(new.begin < old.begin for new, old in zip(found, responses, strict=True))


def _marked(
    ids: np.ndarray, starts: np.ndarray, ends: np.ndarray, responses: Sequence[_Response], crossed: str | None
) -> Encoded:
    """Return the sequence of some ids; a token belongs to the response in which it begins."""
    trained, excluded, unfinished = np.zeros(len(ids), dtype=bool), None, None
    for begin, end, is_trained, whole_from in responses:
        # One without text, such as a begin token, is never trained.
        inside = (starts >= begin) & (starts < end) & (ends > starts)
        if is_trained:
            trained |= inside
        else:
            excluded = inside if excluded is None else excluded | inside
        if whole_from > begin:
            early = inside & (starts < whole_from)
            unfinished = early if unfinished is None else unfinished | early
    return Encoded(ids, trained, crossed, excluded, unfinished=unfinished)


def _cut(text: str, responses: Sequence[_Response]) -> list[Piece]:
    """Cut the text at both ends of every response."""
    edges = sorted({0, len(text), *(edge for r in responses for edge in (r.begin, r.end))})
    kinds = {r.begin: r for r in responses}
    pieces = []
    for begin, end in pairwise(edges):
        response = kinds.get(begin)
        if response is None:
            pieces.append(Piece(text[begin:end], False))
        else:
            whole_from = max(0, response.whole_from - begin)
            pieces.append(Piece(text[begin:end], response.trained, whole_from, excluded=not response.trained))
    return pieces


def _ranges(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return where each token begins and ends in the text, int64 (L,) each.

    Byte-level tokenizers may trim offsets: a token's range then excludes the spaces before its word, and a token of
    only spaces has an empty range. Spaces in no token's range are given to the token after them.
    """
    # A third of the time that numpy takes to find out by itself that these are pairs.
    flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
    starts, ends = flat[::2].copy(), flat[1::2].copy()
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
    return (ids, offsets) if count == len(ids) else (ids[:count], offsets[:count])


def _find(part: list[int], whole: list[int]) -> int:
    """Return where a list occurs in another, 0 if nowhere."""
    starts = range(len(whole) - len(part) + 1)
    return next((start for start in starts if whole[start : start + len(part)] == part), 0)
