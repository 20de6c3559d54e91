"""A recipe's data section carried out: training and held-out sequences, counted, checked and kept on disk."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..errors import RunFailed
from ..paths import JINJA_SUFFIXES, shown_path
from . import store as cache
from .formats import check_columns, detect_format
from .gate import DataRefused, Limits, Tally
from .parallel import map_rows
from .reading import Row, read_rows, source_fingerprint
from .report import data_report
from .sources import Source
from .store import SequenceWriter, read_sequences
from .templates import read_jinja, resolve_template
from .worker import Outcome, RowWorker, Settings


def unit_interval(digest: bytes) -> float:
    """The first 8 bytes of a hash as a number in [0, 1).

    A row is held out if its number is below the fraction to hold out: the same row falls on the same side on every
    machine, in every order and beside any other rows, and exact duplicates never straddle.
    """
    return int.from_bytes(digest[:8], "big") / 2**64


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


TRAIN, EVAL = "train.arrow", "eval.arrow"


@dataclass(frozen=True)
class PreparedData:
    """What a run trains on and is measured on.

    Attributes:
        train: Training sequences: ``input_ids``, ``labels``, ``source`` and ``row`` they come from; memory mapped.
        eval: Held-out sequences, None without any.
        report: The data report, see `prepare_data`.
        largest_token_id: In any sequence, -1 without any.
        stop_token_ids: Tokens that end a response.
        chat_template: Text of the user's Jinja template, None without one.
        from_cache: Whether they were prepared before.
    """

    train: Dataset
    eval: Dataset | None
    report: dict[str, Any]
    largest_token_id: int
    stop_token_ids: tuple[int, ...]
    chat_template: str | None
    from_cache: bool


def prepare_data(
    tokenizer: Any,
    *,
    sources: Sequence[Source],
    eval_sources: Sequence[Source] = (),
    eval_fraction: float | None = None,
    settings: Settings,
    limits: Limits | None = None,
    refuse: bool = True,
    num_proc: int | str = "auto",
    streaming: bool = False,
    progress: Progress | None = None,
) -> PreparedData:
    """Read, format, render, tokenize, cut and check; what was prepared before is found again.

    Args:
        tokenizer: The model's tokenizer, with an end token.
        sources: Training rows, mixed in order.
        eval_sources: Held-out rows.
        eval_fraction: Share of ``sources`` to hold out by hash instead.
        settings: How rows become sequences.
        limits: How much may be wrong with the data; changing them prepares nothing anew.
        refuse: Whether problems raise; else they are in the report alone.
        num_proc: Processes that prepare; the result is the same with any number.
        streaming: Whether Hub data is read without being downloaded first.
        progress: Called with the number of rows done since its last call.

    Returns:
        Sequences and report. The report holds ``rows``, ``tokens``, ``trained_tokens`` and ``truncated`` of the
        training part, ``problems``, ``warnings``, ``settings``, ``sources``, and both parts, ``train`` and ``eval``.

    Raises:
        DataRefused: With all problems of the gate, if ``refuse``.
        UserInputError: If data cannot be read at all.
    """
    limits = limits or Limits()
    key = _key(tokenizer, sources, eval_sources, eval_fraction, settings)
    ready = _load(key)
    from_cache = ready is not None
    if ready is None:
        options = {"num_proc": num_proc, "streaming": streaming, "progress": progress}
        ready = _prepare(key, tokenizer, sources, eval_sources, eval_fraction, settings, options)
    state, train, held_out = ready
    report = data_report(state, train, held_out, settings, limits, eval_fraction)
    if refuse and report["problems"]:
        raise DataRefused(report["problems"], report)
    tallies = [Tally.from_dict(state[part]) for part in ("train", "eval") if state[part]]
    return PreparedData(
        train,
        held_out,
        report,
        largest_token_id=max(tally.largest_token_id for tally in tallies),
        stop_token_ids=tuple(state["stop_token_ids"]),
        chat_template=next((read_jinja(s.prompt_template) for s in sources if _is_file(s)), None),
        from_cache=from_cache,
    )


Ready = tuple[dict[str, Any], Dataset, Dataset | None]


def _prepare(
    key: str,
    tokenizer: Any,
    sources: Sequence[Source],
    eval_sources: Sequence[Source],
    eval_fraction: float | None,
    settings: Settings,
    options: dict[str, Any],
) -> Ready:
    with cache.new_folder(key) as folder:
        train = Part(SequenceWriter(folder / TRAIN))
        has_eval = bool(eval_sources) or eval_fraction is not None
        held_out = Part(SequenceWriter(folder / EVAL)) if has_eval else None
        described = build(tokenizer, sources, train, held_out, settings, eval_fraction=eval_fraction or 0.0, **options)
        if held_out is not None and eval_sources:
            described_eval = build(tokenizer, eval_sources, held_out, None, settings, **options)
        else:
            described_eval = []
        for part in (train, held_out):
            if part is not None:
                part.writer.close()
        ends = {d["end"] for d in described + described_eval if d["end"] is not None} | {tokenizer.eos_token}
        state = {
            "train": train.tally.to_dict(),
            "train_sha256": train.digest.hexdigest(),
            "eval": held_out and held_out.tally.to_dict(),
            "eval_sha256": held_out and held_out.digest.hexdigest(),
            "sources": described,
            "eval_sources": described_eval,
            "overlap": held_out.num_rows_in(train) if held_out else 0,
            "stop_token_ids": sorted(tokenizer.convert_tokens_to_ids(end) for end in ends),
            "eos_token": tokenizer.eos_token,
        }
        return _opened(cache.keep(folder, key, state), state)


def _load(key: str) -> Ready | None:
    found = cache.load_state(key)
    if found is None:
        return None
    try:
        return _opened(*found)
    except (OSError, pa.ArrowInvalid, KeyError, TypeError):
        cache.forget(key)  # damaged: prepare it anew
        return None


def _opened(folder: Path, state: dict[str, Any]) -> Ready:
    train = read_sequences(folder / TRAIN)
    held_out = read_sequences(folder / EVAL) if state["eval"] else None
    for part, dataset in (("train", train), ("eval", held_out)):
        if dataset is not None and len(dataset) != state[part]["sequences"]:
            raise pa.ArrowInvalid(f"{folder} is not complete")
    return state, train, held_out


def _key(
    tokenizer: Any,
    sources: Sequence[Source],
    eval_sources: Sequence[Source],
    eval_fraction: float | None,
    settings: Settings,
) -> str:
    return cache.fingerprint(
        {
            "tokenizer": cache.tokenizer_fingerprint(tokenizer),
            "sources": [_source_key(source) for source in sources],
            "eval_sources": [_source_key(source) for source in eval_sources],
            "eval_fraction": eval_fraction,
            "settings": asdict(settings),
        }
    )


def _source_key(source: Source) -> list[Any]:
    template = read_jinja(source.prompt_template) if _is_file(source) else source.prompt_template
    # The paths are in it for the report, which names them.
    return [source.path, source_fingerprint(source), source.format, source.prompt_template, template, source.weight]


def _is_file(source: Source) -> bool:
    return source.prompt_template.endswith(JINJA_SUFFIXES)
