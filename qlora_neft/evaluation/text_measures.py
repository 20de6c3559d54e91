"""Length and repetition of a model's outputs, as in NEFTune's Table 4 (section 5.2, arXiv:2310.05914). No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UserInputError
from .ngrams import SIZES, log_diversity, repetition
from .plain_table import short_names

CUTOFFS = {"alpaca": 50, "evol": 100, "sharegpt": 150, "platypus": 150}  # whitespace tokens, section 5.2
MAIN = ("characters", "whitespace_tokens", "repetition_2", "log_diversity")
LABELS = (
    ("outputs", "outputs", "{:,}"),
    ("characters", "characters", "{:.2f}"),
    ("whitespace_tokens", "whitespace tokens", "{:.2f}"),
    ("chunk", "chunk, whitespace tokens", "{}"),
    ("dropped", "dropped, shorter than the chunk", "{:,}"),
    ("repetition_2", "2-gram repetition, %", "{:.2f}"),
    ("repetition_3", "3-gram repetition, %", "{:.2f}"),
    ("repetition_4", "4-gram repetition, %", "{:.2f}"),
    ("log_diversity", "log-diversity, the paper's scale", "{:.2f}"),
    ("log_diversity_unscaled", "log-diversity, unscaled", "{:.2f}"),
)


@dataclass(frozen=True)
class TextMeasures:
    """Means over outputs.

    Attributes:
        outputs: How many there are.
        empty: How many of them are empty or white space.
        characters: Mean length.
        whitespace_tokens: Mean number of words between white space.
        chunk: Whitespace tokens at the beginning of an output that the rest is measured on.
        dropped: Outputs shorter than that, left out of the rest.
        repetition_2, repetition_3, repetition_4: Percent of n-grams that repeat an earlier one, the mean over outputs;
            None if all are dropped, as the rest.
        log_diversity: Mean over outputs of `ngrams.log_diversity`, on the scale of the paper's Table 4.
        log_diversity_unscaled: The same with the shares as they are.
    """

    outputs: int
    empty: int
    characters: float
    whitespace_tokens: float
    chunk: int
    dropped: int
    repetition_2: float | None
    repetition_3: float | None
    repetition_4: float | None
    log_diversity: float | None
    log_diversity_unscaled: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def main(self) -> dict[str, Any]:
        """The measures of the paper's Table 4 alone."""
        return {key: value for key, value in asdict(self).items() if key in MAIN}


def chunk_length(chunk: int | None, cutoff: str | None) -> int:
    """The length of the chunk that a user asked for: a number, or a data set of the paper; Alpaca's by default.

    Raises:
        UserInputError: If both are given, or neither can be used.
    """
    if chunk is not None and cutoff is not None:
        raise UserInputError(f"--chunk, --cutoff: give one of them, got {chunk} and {cutoff!r}.")
    if cutoff is not None and cutoff not in CUTOFFS:
        raise UserInputError(f"--cutoff: must be one of {', '.join(CUTOFFS)}, got {cutoff!r}. Or give --chunk N.")
    length = CUTOFFS[cutoff or "alpaca"] if chunk is None else chunk
    if length < max(SIZES):
        raise UserInputError(f"--chunk: must be at least {max(SIZES)}, the longest n-gram, got {length}.")
    return length


def measure_texts(texts: Sequence[str], chunk: int) -> TextMeasures:
    """Measure outputs.

    Args:
        texts: At least one.
        chunk: Whitespace tokens of the chunk at the beginning of each.
    """
    words = [text.split() for text in texts]
    chunks = [found[:chunk] for found in words if len(found) >= chunk]
    rates = [{n: repetition(tokens, n) for n in SIZES} for tokens in chunks]
    return TextMeasures(
        outputs=len(texts),
        empty=sum(not found for found in words),
        characters=sum(map(len, texts)) / len(texts),
        whitespace_tokens=sum(map(len, words)) / len(texts),
        chunk=chunk,
        dropped=len(texts) - len(chunks),
        **{f"repetition_{n}": _mean([rate[n] for rate in rates]) for n in SIZES},
        log_diversity=_mean([log_diversity(rate) for rate in rates]),
        log_diversity_unscaled=_mean([log_diversity(rate, scale=1) for rate in rates]),
    )


def table(measures: dict[str, TextMeasures]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: a measure a row, an output file a column."""
    columns = [found.to_dict() for found in measures.values()]
    rows = [[label, *(_shown(form, column[key]) for column in columns)] for key, label, form in LABELS]
    return ["", *short_names(list(measures))], rows


def _shown(form: str, value: Any) -> str:
    return "-" if value is None else form.format(value)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
