"""Length and repetition of a model's outputs, as in NEFTune's Table 4 (arXiv:2310.05914). No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..display.tables import Table, short_names
from ..errors import UserInputError
from ..files import read_record_if_there
from ..run_folder.checkpoints import PREFIX as CHECKPOINT
from ..run_folder.record import RECIPE_FILE
from .defaults import CUTOFFS, cutoff_of

SIZES = (2, 3, 4)  # n-grams
MAX_LOG_DIVERSITY = 20.0  # for a text that repeats nothing: its logarithm is infinite
TABLE_4 = ("characters", "whitespace_tokens", "repetition_2", "log_diversity")  # the columns of the paper's table
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
FIELDS = ("output", "text", "completion", "response", "answer")  # where an entry of a file may hold its output


@dataclass(frozen=True)
class TextMeasures:
    """Means over outputs.

    Attributes:
        outputs: Number of outputs.
        empty: Outputs that are empty or white space.
        characters: Mean length.
        whitespace_tokens: Mean number of words between white space.
        chunk: Length of the beginning of an output, in whitespace tokens, on which the rest is measured.
        dropped: Outputs shorter than the chunk, left out of the rest.
        repetition_2, repetition_3, repetition_4: Percent of n-grams that repeat an earlier one, averaged over outputs.
            This and the rest is None if all outputs are dropped.
        log_diversity: Mean of `log_diversity` over outputs, on the scale of the paper's Table 4.
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
        """Return plain values for JSON."""
        return asdict(self)

    def main(self) -> dict[str, float | None]:
        """Return only the measures of the paper's Table 4."""
        return {key: value for key, value in asdict(self).items() if key in TABLE_4}


def measure_texts(texts: Sequence[str], chunk: int) -> TextMeasures:
    """Measure outputs.

    Args:
        texts: At least one.
        chunk: Whitespace tokens at the beginning of each on which repetition is measured, at least 4.
    """
    words = [text.split() for text in texts]  # tokens as the paper counts them: between white space
    # Repetition grows with length, so all outputs are compared on beginnings of one length.
    chunks = [found[:chunk] for found in words if len(found) >= chunk]
    rates = [{n: repetition(tokens, n) for n in SIZES} for tokens in chunks]
    return TextMeasures(
        outputs=len(texts),
        empty=sum(not found for found in words),
        characters=sum(map(len, texts)) / len(texts),
        whitespace_tokens=sum(map(len, words)) / len(texts),
        chunk=chunk,
        dropped=len(texts) - len(chunks),
        repetition_2=_mean([rate[2] for rate in rates]),
        repetition_3=_mean([rate[3] for rate in rates]),
        repetition_4=_mean([rate[4] for rate in rates]),
        log_diversity=_mean([log_diversity(rate) for rate in rates]),
        log_diversity_unscaled=_mean([log_diversity(rate, scale=1) for rate in rates]),
    )


def repetition(tokens: Sequence[str], n: int) -> float:
    """Return the percentage of a text's n-grams that occurred before: 100 (1 - different / all).

    Args:
        tokens: At least ``n`` of them.
        n: Length of an n-gram.

    Raises:
        ValueError: If the text is shorter than an n-gram.

    Source: Su et al. 2022, A Contrastive Framework for Neural Text Generation, section 4.1 (rep-n), arXiv:2202.06417.
    """
    count = len(tokens) - n + 1
    if count < 1:
        raise ValueError(f"an n-gram of {n} needs {n} tokens, the text has {len(tokens)}.")
    different = {tuple(tokens[i : i + n]) for i in range(count)}
    return 100 * (1 - len(different) / count)


def log_diversity(repetitions: Mapping[int, float], *, scale: float = 100.0) -> float:
    """Return ``-ln(1 - D)`` with ``D = (1 - r_2 / scale) (1 - r_3 / scale) (1 - r_4 / scale)``, capped at 20.

    ``r_n`` is the share of repeated n-grams between 0 and 1. One would expect ``scale`` 1, but the code behind
    NEFTune's Table 4 divides the shares by 100 as if they were percentages. Its numbers can only be compared on that
    scale, which is the default here. With r = 0.02 for all n, scale 1 gives 2.8 and scale 100 gives 7.4.

    Args:
        repetitions: Percent by n, as `repetition` gives them.
        scale: Divisor of the shares.

    Source: Kirchenbauer et al. 2023, On the Reliability of Watermarks for Large Language Models, arXiv:2306.04634;
    ``metrics/repetition_diversity.py`` in github.com/jwkirchenbauer/lm-watermarking, by an author of NEFTune.
    """
    # / 100 makes the percentages shares again, / scale is the paper's second division.
    diversity = math.prod(1 - percent / 100 / scale for percent in repetitions.values())
    # The floor is exp(-20), so that the logarithm ends at MAX_LOG_DIVERSITY.
    return -math.log(max(1 - diversity, math.exp(-MAX_LOG_DIVERSITY)))


DEFAULT_CHUNK = CUTOFFS["alpaca"]


def chunk_length(chunk: int | None, cutoff: str | None) -> int | None:
    """Return the length of the chunk that a user asked for, as a number or by a data set of the paper.

    Returns:
        None if neither is given: the chunk of each run's own data, see `chunk_of_run`.

    Raises:
        UserInputError: If both are given, or neither can be used.
    """
    if chunk is not None and cutoff is not None:
        raise UserInputError(f"--chunk, --cutoff: give only one of them, got {chunk} and {cutoff!r}.")
    if cutoff is not None and cutoff not in CUTOFFS:
        raise UserInputError(f"--cutoff: must be one of {', '.join(CUTOFFS)}, got {cutoff!r}. Or give --chunk N.")
    length = chunk if cutoff is None else CUTOFFS[cutoff]
    if length is not None and length < max(SIZES):
        raise UserInputError(f"--chunk: must be at least {max(SIZES)}, the longest n-gram, got {length}.")
    return length


def chunk_of_run(folder: str | Path) -> int:
    """Return the paper's chunk for the data that a run was trained on; for other data, and for no run, Alpaca's."""
    path = Path(folder).expanduser()
    # A checkpoint's recipe lies one level up, in the run's folder.
    path = path.parent if path.name.startswith(CHECKPOINT) else path
    recipe = (read_record_if_there(path / RECIPE_FILE) if path.is_dir() else None) or {}
    data = recipe.get("data")
    rows = data.get("path") if isinstance(data, dict) else None
    return CUTOFFS[cutoff_of(str(rows)) or "alpaca"]


def text_table(measures: Mapping[str, TextMeasures]) -> Table:
    """Return one row per measure, one column per file of outputs."""
    columns = [found.to_dict() for found in measures.values()]
    rows = [[label, *(_shown(form, column[key]) for column in columns)] for key, label, form in LABELS]
    return Table(["", *short_names(list(measures))], rows)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _shown(form: str, value: Any) -> str:
    return "-" if value is None else form.format(value)


# ---- Files of outputs ----


def read_texts(path: str | Path, key: str) -> list[str]:
    """Read the outputs in a file, in its order.

    A ``.json`` or ``.jsonl`` file holds strings, or objects with the output under ``output``, ``text``, ``completion``,
    ``response`` or ``answer`` (the first of these that is there). Any other file is text, one output per line.

    Args:
        path: The file.
        key: What the caller wrote, for messages.

    Raises:
        UserInputError: If the file cannot be read or is empty, or an entry has no output.
    """
    path = Path(path)
    if path.suffix.lower() not in (".json", ".jsonl"):
        text = _read(path, key).removesuffix("\n")  # the last line's own end; further empty lines are empty outputs
        if not text:
            raise UserInputError(f"{key}: {str(path)!r} is empty.")
        return text.split("\n")
    return [_output(row, i, path, key) for i, row in enumerate(read_rows(path, key), 1)]


def read_rows(path: str | Path, key: str) -> list[Any]:
    """Read the entries of a JSON list or of JSON lines.

    Args:
        path: The file; with the suffix ``.jsonl``, one entry per line.
        key: What the caller wrote, for messages.

    Raises:
        UserInputError: If it cannot be read or is empty.
    """
    path = Path(path)
    text = _read(path, key)
    rows = _entries_of_lines(path, text, key) if path.suffix.lower() == ".jsonl" else _entries(path, text, key)
    if not rows:
        raise UserInputError(f"{key}: {str(path)!r} is empty.")
    return rows


def _read(path: Path, key: str) -> str:
    if path.is_dir() or not path.exists():  # not is_file: a pipe is neither a file nor a folder
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserInputError(f"{key}: must be a file, {str(path)!r} {found}.")
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(f"{key}: {str(path)!r} cannot be read ({error}).") from error


def _entries(path: Path, text: str, key: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:  # the second for brackets nested a thousand deep
        raise UserInputError(f"{key}: {str(path)!r} is not valid JSON ({error}).") from error
    if not isinstance(rows, list):
        raise UserInputError(f"{key}: {str(path)!r} must hold a JSON list, got {type(rows).__name__}.")
    return rows


def _entries_of_lines(path: Path, text: str, key: str) -> list[Any]:
    rows = []
    # Not splitlines: JSON strings may hold line separators that it would split at.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserInputError(f"{key}: {str(path)!r}, line {number} is not valid JSON ({error}).") from error
    return rows


def _output(row: Any, number: int, path: Path, key: str) -> str:
    if isinstance(row, str):
        return row
    field = next((name for name in FIELDS if name in row), None) if isinstance(row, dict) else None
    if field is None or not isinstance(row[field], str):
        raise UserInputError(
            f"{key}: {str(path)!r}, entry {number} must have its output, a text, under one of {', '.join(FIELDS)}."
        )
    return row[field]
