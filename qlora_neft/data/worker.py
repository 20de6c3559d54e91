"""One row at a time: read it, put its template around it, tokenize it, cut it. Runs in as many processes as asked.

What comes out depends on the row alone, never on the process it was made in or on the rows beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .encode import Encoded, Encoder, cut_to_length
from .formats import BadRow, Dialogue, EmptyRow, Example, Message, Piece, content_hash, to_example
from .reading import Row
from .templates import make_template

Measure = Callable[[Dialogue], int]


def split_dialogue(dialogue: Dialogue, max_length: int, measure: Measure) -> list[Dialogue]:
    """Split a conversation into pieces of whole exchanges, as many in each as fit.

    The NEFTune paper splits ShareGPT "closer to a single-turn format" for its 512 tokens (section 4); FastChat's
    ``split_long_conversation.py`` is the model. Every turn lands in one piece; only a system message, which is never
    trained, stands in each. An exchange that does not fit alone is a piece of its own, to be cut and counted later.

    Args:
        dialogue: What to split; each exchange begins with the first message after a response that is not one.
        max_length: Tokens per piece at most.
        measure: Tokens of a dialogue, template and end tokens included.
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
        # The result of a tool answers the call before it: the two belong together.
        if previous is None or (previous == "assistant" and message["role"] not in ("assistant", "tool")):
            exchanges.append([])
        exchanges[-1].append(message)
        previous = message["role"]
    return system, exchanges


def _piece(dialogue: Dialogue, system: list[Message], exchanges: list[list[Message]]) -> Dialogue:
    return Dialogue((*system, *(message for exchange in exchanges for message in exchange)), dialogue.tools)


# Why a row is left out: it is not what its format says; there is nothing in it to learn; its template has no place for
# it; its responses lie behind max_length.
BAD, EMPTY, UNFIT, NO_ROOM = "bad", "empty", "unfit", "no room"


@dataclass(frozen=True)
class Settings:
    """How rows become sequences; what is learned, all of it.

    Attributes:
        max_length: Tokens per sequence at most.
        train_on_prompt: Whether the loss is on the prompts as well.
        keep_end_token: Whether a response that is cut keeps its end token.
        split_conversations: Whether a conversation that is too long is split on turn boundaries.
    """

    max_length: int
    train_on_prompt: bool = False
    keep_end_token: bool = True
    split_conversations: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    Attributes:
        number, place: Of the row in its source.
        hash: Of what it says, None if it cannot be told.
        sequences: What is trained on; none if the row is left out.
        problem: Why it is left out: `BAD`, `EMPTY`, `UNFIT` or `NO_ROOM`.
        reason: The same in words.
        num_ended: Sequences whose last response ends with its end token, trained.
        num_truncated: Sequences that lost trained tokens, those that lost all of them included.
        turns_left_out: Turns before the first request or after the last response.
        marks: What is only suspicious: ``special``, ``replacement``, ``cut apart``, ``across``.
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

    def placed(self, prefix: str) -> Outcome:
        """The same with a longer name of its place."""
        return replace(self, place=prefix + self.place) if prefix else self


class RowWorker:
    """Rows of one source to sequences.

    Args:
        tokenizer: With an end token.
        format: One of `formats.REQUIRED_COLUMNS`.
        prompt_template: See `make_template`.
        settings: See `Settings`.
    """

    def __init__(self, tokenizer: Any, format: str, prompt_template: str, settings: Settings) -> None:
        self.format, self.settings = format, settings
        self.template = make_template(prompt_template, format, tokenizer)
        self.encoder = Encoder(tokenizer, adds_special_tokens=self.template.adds_special_tokens)
        self.end_id = None if self.template.end is None else tokenizer.convert_tokens_to_ids(self.template.end)
        self._special = _any_of([token for token in tokenizer.all_special_tokens if token])

    def __call__(self, rows: Sequence[Row]) -> list[Outcome]:
        """Work through some rows, in order."""
        read = [self._read(row) for row in rows]
        whole = [(i, pieces) for i, (_, _, pieces) in enumerate(read) if pieces is not None]
        encoded = dict(zip((i for i, _ in whole), self.encoder.encode([pieces for _, pieces in whole]), strict=True))
        return [self._finished(row, *read[i][:2], encoded.get(i)) for i, row in enumerate(rows)]

    def _read(self, row: Row) -> tuple[Example | Outcome, int, list[Piece] | None]:
        if row.values is None:
            return Outcome(row.number, row.place, problem=BAD, reason=row.problem or ""), 0, None
        kind = BAD
        try:
            example, left_out = to_example(row.values, self.format)
            kind = UNFIT
            pieces = self.template.render(example)
        except EmptyRow as error:
            return Outcome(row.number, row.place, problem=EMPTY, reason=str(error)), 0, None
        except BadRow as error:
            return Outcome(row.number, row.place, problem=kind, reason=str(error)), 0, None
        except RecursionError:  # tools are text that may hold anything
            return Outcome(row.number, row.place, problem=BAD, reason="is nested too deep"), 0, None
        if not _is_text(pieces):
            reason = "has half of a surrogate pair in a field that the template writes"
            return Outcome(row.number, row.place, problem=BAD, reason=reason), 0, None
        return example, left_out, pieces

    def _finished(self, row: Row, read: Example | Outcome, left_out: int, encoded: Encoded | None) -> Outcome:
        if isinstance(read, Outcome) or encoded is None:
            return read
        try:
            return self._outcome(row, read, left_out, self._split(read, encoded))
        except BadRow as error:  # a template may take the whole of a conversation and not a part of it
            return Outcome(row.number, row.place, problem=UNFIT, reason=str(error))
        except RecursionError:  # a field that is no text: tools, or a tool call's arguments
            return Outcome(row.number, row.place, problem=BAD, reason="is nested too deep")

    def _outcome(self, row: Row, read: Example, left_out: int, found: list[Encoded]) -> Outcome:
        cut = [cut_to_length(e, self.settings.max_length, keep_end_token=self.settings.keep_end_token) for e in found]
        kept = [(sequence, lost) for sequence, lost in cut if sequence.num_trained()]
        text = _text_of(read)
        marks = {"special"} if self._special and self._special.search(text) else set()
        marks |= {"replacement"} if "\ufffd" in text else set()
        marks |= {sequence.crossed for sequence, _ in kept if sequence.crossed}
        reason = f"{max(len(e.ids) for e in found)} tokens, none of the response within {self.settings.max_length}"
        return Outcome(
            row.number,
            row.place,
            content_hash(read),
            tuple(self._with_prompt(sequence) for sequence, _ in kept),
            problem=None if kept else NO_ROOM,
            reason="" if kept else reason,
            num_ended=sum(int(sequence.ids[sequence.trained][-1]) == self.end_id for sequence, _ in kept),
            num_truncated=sum(lost for _, lost in cut) if kept else 0,
            turns_left_out=left_out,
            marks=frozenset(marks),
        )

    def _split(self, example: Example, encoded: Encoded) -> list[Encoded]:
        too_long = len(encoded.ids) > self.settings.max_length
        if not (too_long and self.settings.split_conversations and isinstance(example, Dialogue)):
            return [encoded]
        pieces = split_dialogue(example, self.settings.max_length, self._length)
        return self.encoder.encode([self.template.render(piece) for piece in pieces])

    def _length(self, dialogue: Dialogue) -> int:
        return self.encoder.lengths([self.template.render(dialogue)])[0]

    def _with_prompt(self, sequence: Encoded) -> Encoded:
        if not self.settings.train_on_prompt:
            return sequence
        return Encoded(sequence.ids, np.ones_like(sequence.trained), sequence.crossed)


def _text_of(example: Example) -> str:
    if isinstance(example, Dialogue):
        return "\n".join(message["content"] for message in example.messages)
    return "\n".join(vars(example).values())


def _is_text(pieces: Sequence[Piece]) -> bool:
    """Whether a tokenizer takes it: contents are looked at as rows are read, a tool's or a speaker's name is not."""
    try:
        return all(piece.text.encode() is not None for piece in pieces)
    except UnicodeEncodeError:
        return False


def _any_of(words: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(re.escape(word) for word in words)) if words else None
