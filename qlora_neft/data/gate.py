"""The gate that data must pass: something to learn, an end to learn, and not too much cut, left out or repeated.

Problems stop a run before any weights are loaded; warnings point at what is only suspicious. Each names the key, the
rule, the rows and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from ..errors import UserInputError
from ..recipe.data import is_data_on_the_hub
from ..recipe.schema import Data
from .store import TallyRecord
from .worker import BAD, EMPTY, NO_ROOM, ONLY_END, UNFIT, Outcome

PLACES_NAMED = 5  # rows named of each kind
DROPPED = (EMPTY, UNFIT, NO_ROOM, ONLY_END)  # kinds of readable rows that are left out
WARN_TRUNCATED = 0.01  # share of rows from which cut responses are worth a line
FEW_TRAINED = 0.02  # share of trained tokens below which nearly all computing is spent on prompts
HARDLY_TRAINED = 0.01  # and below which the cause is more likely a mistake
HARDLY_ANY = (
    " So few are mostly a mistake: the answers in another column, responses cut at data.max_length, data.train_on. "
    "qlora-neft preview marks what is trained."
)
# What is said of rows that may be as intended, by the kind of finding: ``n`` rows, at the places ``p``.
SUSPICIOUS = {
    "special": "{n} with the spelling of a special token, read as that token: {p}.",
    "replacement": "{n} with U+FFFD, the mark of text that was decoded wrongly: {p}.",
    "cut apart": "in {n} a token would reach from prompt into response; the two are tokenized apart: {p}.",
    "space": "in {n} the space that ends the prompt is trained as the response's first: {p}.",
    "across": "in {n} a token reaches from prompt into response, and is not trained: {p}.",
    "not doubled": "in {n} the text has its begin or end token already, which is not added again: {p}.",
    "doubled": "in {n} a message spells a begin or end token, and the chat template writes another: {p}.",
    "left out": "in {n} the chat template leaves out a part of what a response answers: {p}.",
    "off prompt": "in {n} a response stands behind another text than it will in generation: {p}.",
    "unended": "in {n} a response ends without a token that stops generation: {p}.",
    "prompt cut": "in {n} the prompt is cut at data.max_prompt_length: {p}.",
    "marked others": "in {n} a message that is not the assistant's is marked as trained, which has no effect: {p}.",
    "spared others": "in {n} a message that is not the assistant's is marked as not trained; as a prompt it is: {p}.",
    "duplicate": "{n} repeated: {p}.",
}


@dataclass
class Finding:
    """How many rows are of one kind, and the places of the first few."""

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
    """Counts of one part of the data, training or held out.

    Attributes:
        rows: Rows read, including those that are left out.
        sequences: Sequences to train on.
        tokens, trained_tokens: Tokens in these sequences.
        ended: Sequences whose last response ends with a trained end token.
        truncated_sequences: Sequences that lost trained tokens.
        texts_split: Rows of plain text that were split into chunks.
        chunks: Sequences that these became.
        turns_left_out: Turns before the first request or after the last trained response.
        largest_token_id: Largest id in any sequence, -1 without any.
        findings: Rows by kind: ``bad``, ``empty``, ``unfit``, ``no room``, ``truncated``, ``duplicate``, ``special``,
            ``replacement``, ``cut apart``, ``across``, ``left out``, ``off prompt``, ``unended``.
    """

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    ended: int = 0
    truncated_sequences: int = 0
    texts_split: int = 0
    chunks: int = 0
    turns_left_out: int = 0
    largest_token_id: int = -1
    findings: dict[str, Finding] = field(default_factory=dict)

    def finding(self, kind: str) -> Finding:
        """Return the rows of a kind, none yet if it is new."""
        return self.findings.setdefault(kind, Finding())

    def add(self, outcome: Outcome, repeats: str | None = None, times: int = 1) -> None:
        """Count one row.

        Args:
            outcome: The result of preparing it.
            repeats: The earlier row with the same content, in words.
            times: How often the row is used in one epoch.
        """
        self.rows += 1
        if outcome.problem:
            self.finding(outcome.problem).add(_said(outcome.place, outcome.reason))
        if repeats is not None:
            self.finding("duplicate").add(f"{outcome.place} repeats {repeats}")
        # Findings count rows of the source; the sums below count sequences of an epoch.
        if outcome.num_truncated:
            self.finding("truncated").add(outcome.place)
        for mark in sorted(outcome.marks):
            self.finding(mark).add(outcome.place)
        if outcome.left_out:
            self.finding("left out").add(_said(outcome.place, outcome.left_out))
        self.truncated_sequences += times * outcome.num_truncated
        self.texts_split += outcome.num_chunks > 0
        self.chunks += times * outcome.num_chunks
        self.turns_left_out += outcome.turns_left_out
        self.ended += times * outcome.num_ended
        for sequence in outcome.sequences:
            self.sequences += times
            self.tokens += times * len(sequence.ids)
            self.trained_tokens += times * sequence.num_trained()
            self.largest_token_id = max(self.largest_token_id, int(sequence.ids.max()))

    def num_dropped(self) -> int:
        """Count the readable rows that are left out."""
        return sum(self.finding(kind).count for kind in DROPPED)

    def to_dict(self) -> TallyRecord:
        """Return plain values, for JSON."""
        return cast(TallyRecord, asdict(self))

    @classmethod
    def from_dict(cls, values: TallyRecord) -> Tally:
        """Read back what `to_dict` wrote."""
        findings = {kind: Finding(**finding) for kind, finding in values["findings"].items()}
        counts: dict[str, Any] = {name: value for name, value in values.items() if name != "findings"}
        return cls(**counts, findings=findings)


def _said(place: str, reason: str) -> str:
    """Join a place and a reason: ``line 7 is not JSON``, ``line 7: output is missing``."""
    return f"{place} {reason}" if reason.startswith(("is ", "has ")) else ": ".join(filter(None, (place, reason)))


class DataRefused(UserInputError):
    """All problems of the gate at once.

    Attributes:
        problems: The problems, one line each.
        report: The data report, which lists the same problems.
    """

    def __init__(self, problems: Sequence[str], report: Mapping[str, Any]) -> None:
        self.problems, self.report = list(problems), report
        head = "" if len(problems) == 1 else f"the data has {len(problems)} problems:\n  "
        super().__init__(head + "\n  ".join(problems))


def find_problems(tally: Tally, section: Data, key: str = "data.path") -> list[str]:
    """Return what forbids training on these rows, or evaluating on them, one line each.

    Args:
        tally: Counts of one part of the data.
        section: The recipe's data section, with the shares it allows.
        key: The name of the rows' source in messages.
    """
    checks = (_not_rows, _nothing_to_learn, _only_the_end, _left_out, _no_end, _repeated, _cut)
    # One line for each kind of fault, so that a user can settle all of them before the next try.
    problems = [problem for check in checks if (problem := check(tally, section, key))]
    # All rows may be left out, if data.max_dropped_fraction allows that many.
    if not problems and not tally.sequences:
        problems = [f"{key}: no row is left to train on. Give other data."]
    return problems


def find_warnings(tally: Tally, section: Data, key: str = "data.path") -> list[str]:
    """Return what is suspicious but may be intended, one line each; arguments as in `find_problems`."""
    # Only the texts are templates: a key names a path, which may hold braces.
    found = ((text, tally.findings.get(kind)) for kind, text in SUSPICIOUS.items())
    lines = [f"{key}: {text.format(n=_rows(f.count), p=f)}" for text, f in found if f and f.count]
    dropped = tally.num_dropped()
    if dropped and _share(dropped, tally) <= section.max_dropped_fraction:
        named = "; ".join(str(tally.finding(kind)) for kind in DROPPED if tally.finding(kind).count)
        lines.append(f"{key}: {_of(dropped, tally)} left out, as data.max_dropped_fraction allows: {named}.")
    if tally.turns_left_out:
        turns = "1 turn" if tally.turns_left_out == 1 else f"{tally.turns_left_out:,} turns"
        lines.append(f"{key}: {turns} left out (before the first request, or after the last trained response).")
    cut = tally.findings.get("truncated", Finding()).count
    if cut and WARN_TRUNCATED <= _share(cut, tally) <= section.max_truncated_fraction:
        lines.append(f"{_limit(section)}: {_of(cut, tally)} ({_percent(cut, tally)}) cut inside a response.")
    share = tally.trained_tokens / tally.tokens if tally.tokens else 1.0
    if share < FEW_TRAINED:
        few = f"{key}: {share:.1%} of the tokens are trained; the rest is prompt."
        lines.append(few + (HARDLY_ANY if share < HARDLY_TRAINED else ""))
    return lines


def _not_rows(tally: Tally, section: Data, key: str) -> str | None:
    bad = tally.finding(BAD)
    if not bad.count:
        return None
    remedy = _sentence(_done("fix or remove them", section, key))
    return f"{key}: {_of(bad.count, tally)} cannot be read: {bad}. {remedy}"


def _done(what: str, section: Data, key: str) -> str:
    """Return what can be done about rows, where it can be: nobody changes somebody else's dataset on the Hub."""
    name = "data.eval_path" if key.startswith("data.eval") and section.eval_path else "data.path"
    held_out = [section.eval_path or section.path] if key.startswith("data.eval") else None
    paths = held_out or [section.path, *(source.path for source in section.mixture)]
    on_the_hub = [path for path in paths if is_data_on_the_hub(path)]
    if not on_the_hub:
        return what
    if len(on_the_hub) == len(paths):
        return f"{what} in a copy (save the dataset to a file, and name it in {name})"
    return f"{what} (of data from the Hub, in a copy: save it to a file, and name that instead)"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _nothing_to_learn(tally: Tally, section: Data, key: str) -> str | None:
    no_room = tally.finding(NO_ROOM).count
    if tally.sequences or not no_room or no_room < tally.rows - tally.finding(BAD).count:
        return None
    return f"data.max_length: {section.max_length} tokens leave no room for a response in any row of {key}. Raise it."


def _only_the_end(tally: Tally, section: Data, key: str) -> str | None:
    only_end = tally.finding(ONLY_END)
    if not only_end.count or _share(tally.num_dropped(), tally) <= section.max_dropped_fraction:
        return None
    return (
        f"{key}: in {_of(only_end.count, tally)} no token of the response is trained but the one that ends it: "
        f"{only_end}. Let no token hold both the end of the prompt and all of the response: move the space between "
        f"them from the prompt to the response, or set another data.prompt_template; or "
        f"{_done('remove them', section, key)}."
    )


def _left_out(tally: Tally, section: Data, key: str) -> str | None:
    kinds = {
        EMPTY: "empty, without text or response",
        UNFIT: "without a place in the prompt template",
        NO_ROOM: "without a trained token",
    }
    dropped = sum(tally.finding(kind).count for kind in kinds)
    if not dropped or _share(tally.num_dropped(), tally) <= section.max_dropped_fraction:
        return None
    if _nothing_to_learn(tally, section, key):
        return None  # reported already
    found = [(tally.finding(kind), said) for kind, said in kinds.items()]
    parts = [f"{_of(finding.count, tally)} {said}: {finding}" for finding, said in found if finding.count]
    # Only what would help with the kinds of rows that were found.
    remedies = ["raise data.max_length"] * bool(tally.finding(NO_ROOM).count)
    remedies += ["choose another data.prompt_template"] * bool(tally.finding(UNFIT).count)
    remedies.append(_done("remove them", section, key))
    if tally.sequences:
        allowed = _rounded_up(_share(tally.num_dropped(), tally))
        remedies.append(f"leave out so many with data.max_dropped_fraction={allowed}")
    return (
        f"{key}: {'. '.join(parts)}; more than data.max_dropped_fraction={section.max_dropped_fraction:g} of all. "
        f"{_sentence(', or '.join(remedies))}"
    )


def _no_end(tally: Tally, section: Data, key: str) -> str | None:
    if not tally.sequences or tally.ended:
        return None
    if tally.truncated_sequences >= tally.sequences:
        return (
            f"data.keep_end_token: every response of {key} is cut, so the model would never learn to stop. Set it to "
            "true, or raise data.max_length."
        )
    return (
        f"data.prompt_template: no response of {key} ends with a trained end token, so the model would never learn to "
        "stop. Let the template write the tokenizer's end token behind each response."
    )


def _repeated(tally: Tally, section: Data, key: str) -> str | None:
    repeated, remedy = tally.finding("duplicate"), _done("remove them", section, key)
    if not repeated.count or _share(repeated.count, tally) <= section.max_duplicate_fraction:
        return None
    return (
        f"{key}: {_of(repeated.count, tally)} ({_percent(repeated.count, tally)}) repeated, more than "
        f"data.max_duplicate_fraction={section.max_duplicate_fraction:g}: {repeated}. "
        f"{remedy[0].upper()}{remedy[1:]}, or raise it; to use data several times on purpose there are "
        "train.num_train_epochs and data.weight."
    )


def _cut(tally: Tally, section: Data, key: str) -> str | None:
    cut = tally.finding("truncated")
    if not cut.count or _share(cut.count, tally) <= section.max_truncated_fraction:
        return None
    share = f"{_of(cut.count, tally)} ({_percent(cut.count, tally)})"
    limit, tokens = _limit(section), section.max_response_length or section.max_length
    return (
        f"{limit}: {share} of {key} cut inside a response at {tokens} tokens, more than "
        f"data.max_truncated_fraction={section.max_truncated_fraction:g}: {cut}. Raise {limit}, or allow it "
        f"with data.max_truncated_fraction={_rounded_up(_share(cut.count, tally))}."
    )


def _limit(section: Data) -> str:
    """Return the key that cuts most responses."""
    return "data.max_response_length" if section.max_response_length else "data.max_length"


def _share(count: int, tally: Tally) -> float:
    return count / tally.rows if tally.rows else 0.0


def _percent(count: int, tally: Tally) -> str:
    return f"{_share(count, tally):.1%}"


def _of(count: int, tally: Tally) -> str:
    return f"{count:,} of {_rows(tally.rows)}"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _rounded_up(share: float) -> str:
    """Round a share up to two digits, so that allowing it is enough: 0.013 for 0.0123."""
    # Two digits after the leading zeros. The 1e-9 keeps a share of two digits as it is, in spite of binary rounding.
    digits = 1 - math.floor(math.log10(share))
    return f"{min(1.0, math.ceil(share * 10**digits - 1e-9) / 10**digits):g}"
