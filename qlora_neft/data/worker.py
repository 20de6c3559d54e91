"""Prepare one row at a time: read it, render its template, tokenize it, cut it. Runs in any number of processes.

What becomes of a row depends on the row alone, never on the process that handles it or on its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..recipe.schema import Data
from .chat_markers import REASONING
from .chat_wording import special_tokens
from .columns import plain_columns
from .cut import cut_parts, cut_to_length, split_into_chunks
from .encode import Encoded, Encoder
from .examples import BadRow, Dialogue, EmptyRow, Example, Piece, Rendered, content_hash, prompt_hash
from .formats import RowRead, RowReader
from .messages import MARKED_OTHERS, SPARED_OTHERS
from .shorten import is_long
from .sources import Row
from .template_limits import many_renderings
from .templates import make_template
from .turns import last_exchanges, narrowed, split_dialogue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Why a row is left out: it is not what its format says; there is nothing in it to learn; its template cannot express
# it; its responses start beyond max_length; no token of them is trained but the one that ends them.
BAD, EMPTY, UNFIT, NO_ROOM, ONLY_END = "bad", "empty", "unfit", "no room", "only end"
TOO_DEEP = "is nested too deep"


@dataclass(frozen=True)
class Outcome:
    """The result of preparing one row.

    Attributes:
        number, place: The row's, see `Row`.
        hash: Hash of the row's content, None if it could not be read.
        sequences: Sequences to train on; empty if the row is left out.
        sums: The digest of each sequence.
        prompt: Hash of the request it begins with, None without one.
        problem: Why it is left out: `BAD`, `EMPTY`, `UNFIT`, `NO_ROOM` or `ONLY_END`.
        reason: The same in words.
        num_ended: Sequences whose last response ends with a trained end token.
        num_truncated: Sequences that lost trained tokens, including those that lost all of them.
        num_chunks: Sequences that a long text was split into, 0 for any other row.
        turns_left_out: Turns before the first request or after the last trained response.
        marks: What is suspicious but allowed, see `gate.SUSPICIOUS`.
        left_out: What the template leaves out of it, in words.
        columns_not_used, keys_not_used: Its columns, and keys of its messages, that nothing is read from.
    """

    number: int
    place: str
    hash: bytes | None = None
    sequences: tuple[Encoded, ...] = ()
    sums: tuple[bytes, ...] = ()
    prompt: bytes | None = None
    problem: str | None = None
    reason: str = ""
    num_ended: int = 0
    num_truncated: int = 0
    num_chunks: int = 0
    turns_left_out: int = 0
    marks: frozenset[str] = field(default_factory=frozenset)
    left_out: str = ""
    columns_not_used: frozenset[str] = frozenset()
    keys_not_used: frozenset[str] = frozenset()

    def placed(self, prefix: str) -> Outcome:
        """Return the outcome with a prefix on its place."""
        return replace(self, place=prefix + self.place) if prefix else self


class _Readable(NamedTuple):
    """A row that was read, and its texts."""

    read: RowRead
    rendered: Rendered

    @property
    def example(self) -> Example:
        """What the row says."""
        return self.read.example


class RowWorker:
    """Turns rows of one source into sequences. Picklable, so that worker processes can share it.

    Args:
        tokenizer: The model's tokenizer, with an end token.
        format: One of `columns.REQUIRED_COLUMNS`.
        prompt_template: See `make_template`.
        section: The recipe's data section: how long sequences are, what is trained, what is cut or split.
        now: The moment that a template reading today's date writes; None for that of each rendering.
        reader: How rows are read; by default, by the format's own names of columns.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        format: str,
        prompt_template: str,
        section: Data,
        now: datetime | None = None,
        reader: RowReader | None = None,
    ) -> None:
        self.section, self.format = section, format
        self.reader = reader or RowReader(plain_columns(format))
        self.template = make_template(prompt_template, format, tokenizer, now, section.chat_template_kwargs)
        self.encoder = Encoder(
            tokenizer, adds_special_tokens=self.template.adds_special_tokens, most=_most_kept(section, format)
        )
        ends = {end for end in (self.template.end, self.template.end_of_call) if end is not None}
        self.end_ids = {tokenizer.convert_tokens_to_ids(end) for end in ends}
        self._ends = {tokenizer.eos_token_id, *self.end_ids}
        self._prompt_weight = section.prompt_weight
        # A template may read any key of a message: one that its text does not name is not used.
        self._template_words = set(re.findall(r"\w+", self.template.source))
        self._special = self.template.special or special_tokens(tokenizer)
        # Hundreds of tokens, thousands on Gemma: most texts have none of their first characters.
        self._firsts = {word.lstrip("\\")[:1] for word in re.split(r"(?<!\\)\|", self._special.pattern)}
        plain = (self.encoder.begin or "", self.template.end or "") if self.template.adds_special_tokens else ("", "")
        self._own_ends = plain

    def __call__(self, rows: Sequence[Row]) -> list[Outcome]:
        """Prepare some rows, in order; a fast tokenizer gets them as one batch."""
        with many_renderings():
            return self._outcomes(rows)

    def _outcomes(self, rows: Sequence[Row]) -> list[Outcome]:
        read = [self._read(row) for row in rows]
        # Tokenized in one call: a fast tokenizer works on a batch much faster than on single texts.
        texts = [pieces for r in read if isinstance(r, _Readable) for pieces in r.rendered.sequences]
        encoded = iter(self.encoder.encode(texts))
        return [
            self._finished(row, r, list(islice(encoded, len(r.rendered.sequences)))) if isinstance(r, _Readable) else r
            for row, r in zip(rows, read, strict=True)
        ]

    def _read(self, row: Row) -> _Readable | Outcome:
        if row.values is None:
            return _left_out(row, BAD, row.problem or "")
        kind = BAD
        try:
            read = self.reader.read(row.values)
            if isinstance(read.example, Dialogue):
                trains_prompts = self._prompt_weight > 0
                example, untrained = narrowed(read.example, self.section.train_on, trains_prompts=trains_prompts)
                read = replace(read, example=example, turns_left_out=read.turns_left_out + untrained)
            # From here on the row is what its format says, and what fails is the template.
            kind = UNFIT
            rendered = self.template.sequences(read.example)
        except EmptyRow as error:
            return _left_out(row, EMPTY, str(error))
        except BadRow as error:
            return _left_out(row, kind, str(error))
        except RecursionError:  # ``tools`` may be JSON text, nested as deep as its author likes
            return _left_out(row, BAD, TOO_DEEP)
        if not all(map(_is_text, rendered.sequences)):
            return _left_out(row, BAD, "has half of a surrogate pair in a field that the template writes")
        return _Readable(read, rendered)

    def _finished(self, row: Row, read: _Readable, encoded: list[Encoded]) -> Outcome:
        try:
            return self._outcome(row, read, self._split(read.example, encoded))
        except BadRow as error:  # a template may accept a whole conversation and refuse a part of it
            return _left_out(row, UNFIT, str(error))
        except RecursionError:  # a field that is not text: tools, or a tool call's arguments
            return _left_out(row, BAD, TOO_DEEP)

    def _outcome(self, row: Row, read: _Readable, found: list[Encoded]) -> Outcome:
        example, rendered = read.example, read.rendered
        text = _text_of(example)
        marks = self._spelled(text)
        cut = [self._cut(sequence, marks) for sequence in found]
        kept = [(sequence, lost) for sequence, lost in cut if sequence.num_trained()]
        if kept and all(self._trains_only_the_end(sequence) for sequence, _ in kept):
            return _left_out(row, ONLY_END, "only the end token of the response would be trained")
        marks |= {"replacement"} if "\ufffd" in text else set()
        sequences = tuple(self._weighted(sequence) for sequence, _ in kept)
        marks |= {sequence.crossed for sequence, _ in kept if sequence.crossed} | rendered.marks
        # What a row says of messages that are not the assistant's counts only against what the recipe does with them.
        marks |= read.read.marks - {MARKED_OTHERS if self._prompt_weight else SPARED_OTHERS}
        return Outcome(
            row.number,
            row.place,
            content_hash(example),
            sequences,
            tuple(sequence.digest() for sequence in sequences),
            prompt_hash(example),
            problem=None if kept else NO_ROOM,
            reason="" if kept else self._no_room(rendered, found),
            # On the sequences before prompts are trained as well.
            num_ended=sum(_last_trained(sequence) in self.end_ids for sequence, _ in kept),
            # A row that lost every trained token is counted once, as left out.
            num_truncated=sum(lost for _, lost in cut) if kept else 0,
            num_chunks=len(found) if self._is_chunked(found) else 0,
            turns_left_out=read.read.turns_left_out,
            marks=frozenset(marks),
            left_out=rendered.left_out,
            columns_not_used=read.read.columns_not_read,
            keys_not_used=read.read.extra_keys - self._template_words,
        )

    def _no_room(self, rendered: Rendered, found: Sequence[Encoded]) -> str:
        # Of a row without its middle, the number of tokens is not known.
        most = self.encoder.most
        is_short = most is None or not any(is_long(pieces, most) for pieces in rendered.sequences)
        count = f"{max(len(e.ids) for e in found)}" if is_short else f"more than {most}"
        return f"{count} tokens, none of the response within {self.section.max_length}"

    def _spelled(self, text: str) -> set[str]:
        """Return what is found of special tokens in a row's own text."""
        if not any(first in text for first in self._firsts) or not self._special.search(text):
            return set()
        begin, end = self._own_ends
        said = text.strip()
        inner = said.removeprefix(begin).removesuffix(end)
        found = {"not doubled"} if inner != said else set()
        return found | ({"special"} if self._special.search(inner) else set())

    def _cut(self, sequence: Encoded, marks: set[str]) -> tuple[Encoded, bool]:
        """Cut a sequence to the lengths of the recipe; return it, and whether trained tokens were lost."""
        section, lost = self.section, False
        if section.max_prompt_length or section.max_response_length:
            sequence, prompt_cut, lost = cut_parts(
                sequence,
                section.max_prompt_length,
                section.max_response_length,
                keep_end_token=section.keep_end_token,
            )
            marks |= {"prompt cut"} if prompt_cut else set()
        sequence, lost_more = cut_to_length(sequence, section.max_length, keep_end_token=section.keep_end_token)
        return sequence, lost or lost_more

    def _trains_only_the_end(self, sequence: Encoded) -> bool:
        ids, trained = sequence.ids[1:], sequence.trained[1:]  # nothing predicts the first token
        # Nearly every row is settled by its first trained token.
        return int(ids[trained.argmax()]) in self._ends and {*ids[trained].tolist()} <= self._ends

    def _is_chunked(self, found: Sequence[Encoded]) -> bool:
        return len(found) > 1 and self.section.split_text and self.format == "text"

    def _split(self, example: Example, encoded: list[Encoded]) -> list[Encoded]:
        section, max_length = self.section, self.section.max_length
        # Only what is too long, since each piece of a conversation is rendered and tokenized again.
        if not any(len(sequence.ids) > max_length for sequence in encoded):
            return encoded
        if section.split_text and self.format == "text":
            return split_into_chunks(encoded[0], max_length)
        if not (section.split_conversations and isinstance(example, Dialogue)):
            return encoded
        # Measured by rendering and tokenizing: what a template adds to a piece is not known before.
        if section.train_on == "last-response":
            pieces = [last_exchanges(example, max_length, self._length)]
        else:
            pieces = split_dialogue(example, max_length, self._length)
        return self.encoder.encode([text for piece in pieces for text in self.template.sequences(piece).sequences])

    def _length(self, dialogue: Dialogue) -> int:
        return max(self.encoder.lengths(self.template.sequences(dialogue).sequences))

    def _weighted(self, sequence: Encoded) -> Encoded:
        """Let the tokens outside responses count as much as the recipe says, and those of excluded responses nothing.

        Where a prompt holds earlier responses (TRL's ``prompt`` with ``completion``), these are prompt.
        """
        weight = self._prompt_weight
        if not weight:
            return sequence
        trained = np.ones_like(sequence.trained)
        if sequence.excluded is not None and self.format != "prompt-completion":
            trained = ~sequence.excluded
        if weight == 1:
            return Encoded(sequence.ids, trained, sequence.crossed)
        weights = np.where(sequence.trained, np.float32(1), np.float32(weight)) * trained
        return Encoded(sequence.ids, trained, sequence.crossed, weights=weights)


def _most_kept(section: Data, format: str) -> int | None:
    """Return the largest number of tokens that is kept of a row or of a part of it, None if all of them are."""
    if section.split_text and format == "text":
        return None
    return max(section.max_length, section.max_prompt_length or 0, section.max_response_length or 0)


def _last_trained(sequence: Encoded) -> int:
    """Return the id of the last trained token, of which there is one."""
    return int(sequence.ids[len(sequence.ids) - 1 - sequence.trained[::-1].argmax()])


def _left_out(row: Row, problem: str, reason: str) -> Outcome:
    return Outcome(row.number, row.place, problem=problem, reason=reason)


def _text_of(example: Example) -> str:
    if isinstance(example, Dialogue):
        thoughts = (message[REASONING[0]] for message in example.messages if REASONING[0] in message)
        return "\n".join(chain(thoughts, (message["content"] for message in example.messages)))
    return "\n".join(vars(example).values())


def _is_text(pieces: Sequence[Piece]) -> bool:
    """Tell whether the text is valid Unicode, which tokenizers require."""
    # Contents were checked as the row was read; the names of tools and speakers were not.
    try:
        return all(piece.text.isascii() or piece.text.encode() is not None for piece in pieces)
    except UnicodeEncodeError:
        return False
