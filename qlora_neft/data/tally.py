"""Counts over a data set as its rows go by: what there is, what was cut, left out, repeated."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .worker import EMPTY, NO_ROOM, UNFIT, Outcome

PLACES_NAMED = 5  # rows named of each kind


@dataclass
class Finding:
    """How many rows something is true of, and the first of them."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count one row."""
        self.count += 1
        if len(self.places) < PLACES_NAMED:
            self.places.append(place)

    def __str__(self) -> str:
        more = self.count - len(self.places)
        return "; ".join(self.places) + (f"; and {more} more" if more > 0 else "")


@dataclass
class Tally:
    """What was found in the rows of one part of the data (training or held out).

    Attributes:
        rows: Rows read, those that are left out included.
        sequences: Sequences trained on.
        tokens, trained_tokens: In them.
        ended: Sequences whose last response ends with its end token, trained.
        turns_left_out: Turns before the first request or after the last response.
        largest_token_id: In any sequence, -1 without any.
        findings: Kind to rows: ``bad``, ``empty``, ``unfit``, ``no room``, ``truncated``, ``duplicate``,
            ``special``, ``replacement``, ``cut apart``.
    """

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    ended: int = 0
    truncated_sequences: int = 0
    turns_left_out: int = 0
    largest_token_id: int = -1
    findings: dict[str, Finding] = field(default_factory=dict)

    def finding(self, kind: str) -> Finding:
        """The rows of a kind, none so far included."""
        return self.findings.setdefault(kind, Finding())

    def add(self, outcome: Outcome, repeats: str | None = None, times: int = 1) -> None:
        """Count one row.

        Args:
            outcome: What became of it.
            repeats: An earlier row that says the same.
            times: How often it is trained on in one epoch.
        """
        self.rows += 1
        if outcome.problem:
            self.finding(outcome.problem).add(_said(outcome.place, outcome.reason))
        if repeats is not None:
            self.finding("duplicate").add(f"{outcome.place} repeats {repeats}")
        if outcome.num_truncated:
            self.finding("truncated").add(outcome.place)
        for mark in sorted(outcome.marks):
            self.finding(mark).add(outcome.place)
        self.truncated_sequences += times * outcome.num_truncated
        self.turns_left_out += outcome.turns_left_out
        self.ended += times * outcome.num_ended
        for sequence in outcome.sequences:
            self.sequences += times
            self.tokens += times * len(sequence.ids)
            self.trained_tokens += times * sequence.num_trained()
            self.largest_token_id = max(self.largest_token_id, int(sequence.ids.max()))

    def num_dropped(self) -> int:
        """Rows left out, of those that can be read."""
        return sum(self.finding(kind).count for kind in (EMPTY, UNFIT, NO_ROOM))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tally:
        """The tally that `to_dict` wrote."""
        findings = {kind: Finding(**finding) for kind, finding in values["findings"].items()}
        return cls(**{**values, "findings": findings})


def _said(place: str, reason: str) -> str:
    """``line 7 is not JSON``, ``line 7: output is missing``."""
    return f"{place} {reason}" if reason.startswith(("is ", "has ")) else ": ".join(filter(None, (place, reason)))
