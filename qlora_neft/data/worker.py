"""Prepare one row at a time: read it, render its template, tokenize it, cut it. Runs in any number of processes.

What becomes of a row depends on the row alone, never on the process that handles it or on its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..recipe.schema import Data
from .encode import Encoded, Encoder, cut_to_length
from .examples import BadRow, Dialogue, EmptyRow, Example, Message, Piece, Rendered, content_hash
from .formats import to_example
from .sources import Row
from .templates import make_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Measure = Callable[[Dialogue], int]
# Why a row is left out: it is not what its format says; there is nothing in it to learn; its template cannot express
# it; its responses start beyond max_length.
BAD, EMPTY, UNFIT, NO_ROOM = "bad", "empty", "unfit", "no room"
TOO_DEEP = "is nested too deep"


@dataclass(frozen=True)
class Outcome:
    """The result of preparing one row.

    Attributes:
        number, place: The row's, see `Row`.
        hash: Hash of the row's content, None if it could not be read.
        sequences: Sequences to train on; empty if the row is left out.
        problem: Why it is left out: `BAD`, `EMPTY`, `UNFIT` or `NO_ROOM`.
        reason: The same in words.
        num_ended: Sequences whose last response ends with a trained end token.
        num_truncated: Sequences that lost trained tokens, including those that lost all of them.
        turns_left_out: Turns before the first request or after the last response.
        marks: What is suspicious but allowed, see `gate.SUSPICIOUS`.
        left_out: What the template leaves out of it, in words.
    """

    number: int
    place: str
    hash: bytes | None = None
    sequences: tuple[Encoded, ...] = ()
    problem: str | None = None
    reason: str = ""
    num_ended: int = 0
    num_truncated: int = 0
    turns_left_out: int = 0
    marks: frozenset[str] = field(default_factory=frozenset)
    left_out: str = ""

    def placed(self, prefix: str) -> Outcome:
        """Return the outcome with a prefix on its place."""
        return replace(self, place=prefix + self.place) if prefix else self


class _Readable(NamedTuple):
    """A row that was read: what it says, how many turns were left out of it, and its texts."""

    example: Example
    turns_left_out: int
    rendered: Rendered


class RowWorker:
    """Turns rows of one source into sequences. Picklable, so that worker processes can share it.

    Args:
        tokenizer: The model's tokenizer, with an end token.
        format: One of `formats.REQUIRED_COLUMNS`.
        prompt_template: See `make_template`.
        section: The recipe's data section: how long sequences are, what is trained, what is cut or split.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, format: str, prompt_template: str, section: Data) -> None:
        self.format, self.section = format, section
        self.template = make_template(prompt_template, format, tokenizer)
        self.encoder = Encoder(tokenizer, adds_special_tokens=self.template.adds_special_tokens)
        self.end_id = None if self.template.end is None else tokenizer.convert_tokens_to_ids(self.template.end)
        self._special = _any_of([token for token in tokenizer.all_special_tokens if token])

    def __call__(self, rows: Sequence[Row]) -> list[Outcome]:
        """Prepare some rows, in order; a fast tokenizer gets them as one batch."""
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
            example, turns_left_out = to_example(row.values, self.format)
            # From here on the row is what its format says, and what fails is the template.
            kind = UNFIT
            rendered = self.template.sequences(example)
        except EmptyRow as error:
            return _left_out(row, EMPTY, str(error))
        except BadRow as error:
            return _left_out(row, kind, str(error))
        except RecursionError:  # ``tools`` may be JSON text, nested as deep as its author likes
            return _left_out(row, BAD, TOO_DEEP)
        if not all(map(_is_text, rendered.sequences)):
            return _left_out(row, BAD, "has half of a surrogate pair in a field that the template writes")
        return _Readable(example, turns_left_out, rendered)

    def _finished(self, row: Row, read: _Readable, encoded: list[Encoded]) -> Outcome:
        try:
            return self._outcome(row, read, self._split(read.example, encoded))
        except BadRow as error:  # a template may accept a whole conversation and refuse a part of it
            return _left_out(row, UNFIT, str(error))
        except RecursionError:  # a field that is not text: tools, or a tool call's arguments
            return _left_out(row, BAD, TOO_DEEP)

    def _outcome(self, row: Row, read: _Readable, found: list[Encoded]) -> Outcome:
        example, rendered = read.example, read.rendered
        cut = [cut_to_length(e, self.section.max_length, keep_end_token=self.section.keep_end_token) for e in found]
        kept = [(sequence, lost) for sequence, lost in cut if sequence.num_trained()]
        text = _text_of(example)
        marks = {"special"} if self._special and self._special.search(text) else set()
        marks |= {"replacement"} if "\ufffd" in text else set()
        marks |= {sequence.crossed for sequence, _ in kept if sequence.crossed} | rendered.marks
        reason = f"{max(len(e.ids) for e in found)} tokens, none of the response within {self.section.max_length}"
        return Outcome(
            row.number,
            row.place,
            content_hash(example),
            tuple(self._with_prompt(sequence) for sequence, _ in kept),
            problem=None if kept else NO_ROOM,
            reason="" if kept else reason,
            # On the sequences before prompts are trained as well.
            num_ended=sum(int(sequence.ids[sequence.trained][-1]) == self.end_id for sequence, _ in kept),
            # A row that lost every trained token is counted once, as left out.
            num_truncated=sum(lost for _, lost in cut) if kept else 0,
            turns_left_out=read.turns_left_out,
            marks=frozenset(marks),
            left_out=rendered.left_out,
        )

    def _split(self, example: Example, encoded: list[Encoded]) -> list[Encoded]:
        # Only what is too long, since each piece is rendered and tokenized again.
        too_long = any(len(sequence.ids) > self.section.max_length for sequence in encoded)
        if not (too_long and self.section.split_conversations and isinstance(example, Dialogue)):
            return encoded
        # Measured by rendering and tokenizing: what a template adds to a piece is not known before.
        pieces = split_dialogue(example, self.section.max_length, self._length)
        return self.encoder.encode([text for piece in pieces for text in self.template.sequences(piece).sequences])

    def _length(self, dialogue: Dialogue) -> int:
        return max(self.encoder.lengths(self.template.sequences(dialogue).sequences))

    def _with_prompt(self, sequence: Encoded) -> Encoded:
        if not self.section.prompt_weight:
            return sequence
        return Encoded(sequence.ids, np.ones_like(sequence.trained), sequence.crossed)


def _left_out(row: Row, problem: str, reason: str) -> Outcome:
    return Outcome(row.number, row.place, problem=problem, reason=reason)


def _text_of(example: Example) -> str:
    if isinstance(example, Dialogue):
        return "\n".join(message["content"] for message in example.messages)
    return "\n".join(vars(example).values())


def _is_text(pieces: Sequence[Piece]) -> bool:
    """Tell whether the text is valid Unicode, which tokenizers require."""
    # Contents were checked as the row was read; the names of tools and speakers were not.
    try:
        return all(piece.text.encode() is not None for piece in pieces)
    except UnicodeEncodeError:
        return False


def _any_of(words: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(re.escape(word) for word in words)) if words else None


# ---- Splitting conversations ----


def split_dialogue(dialogue: Dialogue, max_length: int, measure: Measure) -> list[Dialogue]:
    """Split a conversation into pieces of whole exchanges, as many in each piece as fit.

    The NEFTune paper splits ShareGPT "closer to a single-turn format" for its 512 tokens (section 4); FastChat's
    ``split_long_conversation.py`` is the model. Each turn is in exactly one piece, except a system message: it is never
    trained, and every piece repeats it. An exchange too long by itself becomes its own piece, to be cut and counted
    later.

    Args:
        dialogue: The conversation. An exchange begins at the first message after a response that is not itself one.
        max_length: Maximum number of tokens per piece.
        measure: Counts the tokens of a dialogue, including template and end tokens.
    """
    system, exchanges = _exchanges(dialogue.messages)
    pieces: list[Dialogue] = []
    start = 0
    while start < len(exchanges):
        stop = start + 1
        while stop < len(exchanges) and measure(_piece(dialogue, system, exchanges[start : stop + 1])) <= max_length:
            stop += 1
        pieces.append(_piece(dialogue, system, exchanges[start:stop]))
        start = stop
    return pieces


def _exchanges(messages: tuple[Message, ...]) -> tuple[list[Message], list[list[Message]]]:
    system = [message for message in messages[:1] if message["role"] in ("system", "developer")]
    exchanges: list[list[Message]] = []
    previous = None
    for message in messages[len(system) :]:
        # A tool's result answers the call before it, so the two stay together.
        if previous is None or (previous == "assistant" and message["role"] not in ("assistant", "tool")):
            exchanges.append([])
        exchanges[-1].append(message)
        previous = message["role"]
    return system, exchanges


def _piece(dialogue: Dialogue, system: list[Message], exchanges: list[list[Message]]) -> Dialogue:
    return Dialogue((*system, *(message for exchange in exchanges for message in exchange)), dialogue.tools)
