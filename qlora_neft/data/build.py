"""Rows of all sources through their workers into files: the part of the preparation that is worth keeping."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..errors import RunFailed
from ..files.bundled import shown_path
from .formats import check_columns, detect_format
from .parallel import map_rows
from .reading import Row, read_rows
from .sources import Source
from .split import unit_interval
from .store import SequenceWriter
from .tally import Tally
from .templates import resolve_template
from .worker import Outcome, RowWorker, Settings

HEAD = 1000  # rows that tell a format
Progress = Callable[[int], None]


@dataclass
class Part:
    """Training rows, or held-out ones, as they are written.

    Attributes:
        writer: Of its sequences.
        tally: Of its rows.
        first_rows: Hash of what a row says, to the (source, number) of the first that says it.
        used: Hashes of the rows that are trained on (or measured by) at all.
        digest: SHA-256 of all hashes, in order.
    """

    writer: SequenceWriter
    tally: Tally = field(default_factory=Tally)
    first_rows: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    used: Counter[bytes] = field(default_factory=Counter)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, outcomes: Sequence[tuple[Outcome, int]], source: int, prefix: str) -> None:
        """Take the outcomes of some rows of one source, each with how often it is trained on in an epoch."""
        sequences, rows = [], []
        for outcome, times in outcomes:
            self.tally.add(outcome.placed(prefix), self._earlier(outcome, source), times)
            if outcome.hash is not None and times:
                self.used[outcome.hash] += 1
            sequences += list(outcome.sequences) * times
            rows += [outcome.number] * (len(outcome.sequences) * times)
        self.writer.write(sequences, source, rows)

    def num_rows_in(self, other: Part) -> int:
        """How many rows say what a row of another part says."""
        return sum(count for said, count in self.used.items() if said in other.used)

    def _earlier(self, outcome: Outcome, source: int) -> str | None:
        """The row that said the same before, in words."""
        if outcome.hash is None:
            return None
        self.digest.update(outcome.hash)
        first = self.first_rows.setdefault(outcome.hash, (source, outcome.number))
        if first == (source, outcome.number):
            return None
        return f"row {first[1]}" + (f" of source {first[0] + 1}" if first[0] != source else "")


def build(
    tokenizer: Any,
    sources: Sequence[Source],
    train: Part,
    held_out: Part | None,
    settings: Settings,
    *,
    eval_fraction: float = 0.0,
    num_proc: int | str = "auto",
    streaming: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Read sources and write their sequences.

    Args:
        tokenizer: With an end token.
        sources: In order.
        train: Takes the rows.
        held_out: Takes the share ``eval_fraction`` of them, picked by hash.
        settings: How rows become sequences.
        eval_fraction: 0 for none.
        num_proc: Processes.
        streaming: Whether Hub data is read without being downloaded first.
        progress: Called with the number of rows done since the last call.

    Returns:
        For each source what was found: ``path``, ``rows``, ``format``, ``prompt_template``, ``weight``, ``end``.

    Raises:
        UserInputError: If a source cannot be read at all, or fits no format. Bad rows are counted, not raised.
        RunFailed: If the disk is full.
    """
    found = []
    for index, source in enumerate(sources):
        format, rows = _with_format(source, streaming)
        worker = RowWorker(tokenizer, format, source.prompt_template, settings)
        prefix = f"{Path(source.path).name}, " if len(sources) > 1 else ""
        count = 0
        for outcomes in map_rows(worker, rows, num_proc):
            kept, out = _divided(outcomes, eval_fraction if held_out else 0.0, source.weight)
            _write(train, kept, index, prefix)
            if held_out is not None:
                _write(held_out, out, index, prefix)
            count += len(outcomes)
            if progress:
                progress(len(outcomes))
        found.append(_described(source, format, count, worker.template.end))
    return found


def _write(part: Part, outcomes: Sequence[tuple[Outcome, int]], index: int, prefix: str) -> None:
    try:
        part.add(outcomes, index, prefix)
    except OSError as error:
        raise RunFailed(
            f"the prepared data cannot be written to {str(part.writer.path.parent)!r} ({error.strerror or error}). "
            "Free space there, or set HF_DATASETS_CACHE to a folder that has some, and run the same command again."
        ) from error


def _with_format(source: Source, streaming: bool) -> tuple[str, Iterator[Row]]:
    rows = read_rows(source, streaming=streaming)
    head = list(islice(rows, HEAD))
    readable = [row.values for row in head if row.values is not None]
    format = source.format
    if readable and format == "auto":
        format = detect_format(readable, source.key, source.path)
    elif readable:
        check_columns(readable, format, f"{source.key}: {source.path!r}")
    # Without a row that can be read, any format will do: each row says what is wrong with it.
    return ("text" if format == "auto" else format), chain(head, rows)


def _divided(
    outcomes: Sequence[Outcome], eval_fraction: float, weight: float
) -> tuple[list[tuple[Outcome, int]], list[tuple[Outcome, int]]]:
    """Training and held-out rows, each with how often it is used; rows that say nothing count as training."""
    train, held_out = [], []
    for outcome in outcomes:
        if outcome.hash is not None and unit_interval(outcome.hash[:8]) < eval_fraction:
            held_out.append((outcome, 1))
        else:
            train.append((outcome, _times(outcome, weight)))
    return train, held_out


def _times(outcome: Outcome, weight: float) -> int:
    whole = math.floor(weight)
    if outcome.hash is None or whole == weight:
        return whole
    # Other bytes than the held-out split goes by: the two choices have nothing to do with each other.
    return whole + (unit_interval(outcome.hash[8:]) < weight - whole)


def _described(source: Source, format: str, rows: int, end: str | None) -> dict[str, Any]:
    return {
        "path": shown_path(source.path),
        "rows": rows,
        "format": format,
        "prompt_template": resolve_template(source.prompt_template, format),
        "weight": source.weight,
        "end": end,
    }
