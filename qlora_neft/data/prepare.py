"""Carry out a recipe's data section: training and held-out sequences, counted, checked and kept on disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from datasets import Dataset

from ..errors import RunFailed
from ..paths import JINJA_SUFFIXES, shown_path
from ..recipe.schema import Data
from . import store
from .gate import DataRefused, Tally
from .identity import fingerprint, special_tokens, templates, tokenizer_parts
from .parallel import map_rows
from .reading import source_fingerprint
from .report import DataReport, data_report
from .source_facts import NotUsed, chosen_template, facts_of, with_reader
from .sources import Source, held_out_sources, row_size, training_sources
from .store import SEQUENCE_KEYS, SequenceWriter, SourceFacts, State, read_sequences
from .template_date import reads_date, written
from .templates import read_jinja
from .worker import Outcome, RowWorker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN, EVAL = "train.arrow", "eval.arrow"

Progress = Callable[[int], None]
NumProc = int | Literal["auto"]
Ready = tuple[State, Dataset, Dataset | None]


@dataclass(frozen=True)
class PreparedData:
    """The sequences a run trains on and is evaluated on.

    Attributes:
        train: Training sequences, memory mapped: ``input_ids``, ``labels``, and the ``source`` and ``row`` they
            come from.
        eval: Held-out sequences, None without any.
        report: The data report, see `prepare_data`.
        largest_token_id: Largest id in any sequence, -1 without any.
        stop_token_ids: Tokens that end a response.
        chat_template: Text of the user's Jinja template, None without one.
        from_cache: Whether the sequences had been prepared before.
        templates: SHA-256 of the chat templates they were rendered by, see `identity.templates`.
        now: The moment whose date the templates wrote, ISO 8601; None if none of them reads it.
    """

    train: Dataset
    eval: Dataset | None
    report: DataReport
    largest_token_id: int
    stop_token_ids: tuple[int, ...]
    chat_template: str | None
    from_cache: bool
    templates: dict[str, str] = field(default_factory=dict)
    now: str | None = None


def prepare_data(
    tokenizer: PreTrainedTokenizerBase,
    section: Data,
    *,
    key: str = "data.path",
    refuse: bool = True,
    num_proc: NumProc = "auto",
    streaming: bool = False,
    progress: Progress | None = None,
    now: datetime | None = None,
) -> PreparedData:
    """Read, format, render, tokenize, cut and check rows, or find them prepared in the cache.

    In a notebook: ``prepare_data(tokenizer, Data(path="rows.jsonl", max_length=512))``.

    Args:
        tokenizer: The model's tokenizer, with an end token.
        section: A recipe's data section.
        key: The name the caller wrote for ``section.path``, for messages.
        refuse: Whether problems raise an error; otherwise they are only listed in the report.
        num_proc: Number of processes; the result is the same with any number.
        streaming: Whether to read Hub data without downloading it first.
        progress: Called with the number of rows finished since its last call.
        now: The moment that chat templates reading today's date are to write; None for that of the call.

    Returns:
        Sequences and report. The report holds ``rows``, ``tokens``, ``trained_tokens`` and ``truncated`` of the
        training part, ``problems``, ``warnings``, ``settings``, ``sources``, and both parts, ``train`` and ``eval``.

    Raises:
        DataRefused: With all problems of the gate, if ``refuse``.
        UserInputError: If the data cannot be read at all.
    """
    sources, eval_sources = training_sources(section, key), held_out_sources(section, key)
    # Of one moment: a preparation that runs past midnight writes one date. Whole seconds, which are what is recorded.
    now = (now or datetime.now()).replace(microsecond=0)
    # From the cache, or prepared now.
    cache_key = _cache_key(tokenizer, section, sources, eval_sources, now)
    ready = _load(cache_key)
    from_cache = ready is not None
    if ready is None:
        preparation = _Preparation(tokenizer, section, num_proc, streaming, progress, now)
        ready = preparation.run(cache_key, sources, eval_sources)
    state, train, held_out = ready
    # Found by their content: the same files may have lain elsewhere when they were prepared.
    for facts, source in zip(state["sources"] + state["eval_sources"], [*sources, *eval_sources], strict=True):
        facts["path"] = shown_path(source.path)
        if _is_file(facts["prompt_template"]):
            facts["prompt_template"] = source.prompt_template
    # Made anew each time: the gate's limits are not part of the cache key.
    report = data_report(state, train, held_out, section)
    if refuse and report["problems"]:
        raise DataRefused(report["problems"], report)
    tallies = [Tally.from_dict(part) for part in (state["train"], state["eval"]) if part]
    return PreparedData(
        train,
        held_out,
        report,
        largest_token_id=max(tally.largest_token_id for tally in tallies),
        stop_token_ids=tuple(state["stop_token_ids"]),
        chat_template=next((read_jinja(s.prompt_template) for s in sources if _is_file(s.prompt_template)), None),
        from_cache=from_cache,
        templates=templates(tokenizer, _used(state)),
        now=now.isoformat() if any(reads_date(_text(name, tokenizer)) for name in _used(state)) else None,
    )


def _used(state: State) -> list[str]:
    return [facts["prompt_template"] for facts in state["sources"] + state["eval_sources"]]


def _text(name: str, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str] | None:
    """Return the text of a chat template, by name; None for a template of this package."""
    if name in ("chat", "auto"):
        return tokenizer.chat_template
    return read_jinja(name) if _is_file(name) else None


# ---- What was prepared before ----


def _cache_key(
    tokenizer: PreTrainedTokenizerBase,
    section: Data,
    sources: Sequence[Source],
    eval_sources: Sequence[Source],
    now: datetime,
) -> str:
    named = dict.fromkeys(source.prompt_template for source in (*sources, *eval_sources))
    return fingerprint(
        {
            "tokenizer": [tokenizer_parts(tokenizer), special_tokens(tokenizer), tokenizer.chat_template],
            # A day's rows are found again on that day, and by a resume, which renders with the date of its beginning.
            "date": [written(_text(name, tokenizer), now) for name in named],
            "sources": [_source_key(source) for source in sources],
            "eval_sources": [_source_key(source) for source in eval_sources],
            # Changes no sequence, but which part a row goes to.
            "eval_fraction": section.eval_fraction,
            "settings": {key: getattr(section, key) for key in SEQUENCE_KEYS},
        }
    )


def _source_key(source: Source) -> list[Any]:
    template = read_jinja(source.prompt_template) if _is_file(source.prompt_template) else source.prompt_template
    # A file's name decides no sequence; it is here because the places of rows, which are stored with them, have it. The
    # folder it lies in is not: moved, it is the same data.
    named = "file" if _is_file(source.prompt_template) else source.prompt_template
    read = [source.format, dict(source.columns), dict(source.roles), source.system_prompt]
    return [Path(source.path).name, source_fingerprint(source), read, named, template, source.weight]


def _is_file(template: str) -> bool:
    return template.endswith(JINJA_SUFFIXES)


def _load(cache_key: str) -> Ready | None:
    found = store.load_state(cache_key)
    if found is None:
        return None
    try:
        return _opened(*found)
    except (OSError, pa.ArrowInvalid, KeyError, TypeError):
        store.forget(cache_key)  # damaged: prepare it again
        return None


def _opened(folder: Path, state: State) -> Ready:
    train = read_sequences(folder / TRAIN)
    held_out = read_sequences(folder / EVAL) if state["eval"] else None
    for tally, dataset in ((state["train"], train), (state["eval"], held_out)):
        # An Arrow stream that broke off between two batches reads as a shorter one, without an error.
        if tally is not None and dataset is not None and len(dataset) != tally["sequences"]:
            raise pa.ArrowInvalid(f"{folder} is not complete")
    return state, train, held_out


# ---- Preparing ----


@dataclass(frozen=True)
class _Preparation:
    """How rows are read and prepared, the same for training and held-out ones; attributes as in `prepare_data`."""

    tokenizer: PreTrainedTokenizerBase
    section: Data
    num_proc: NumProc
    streaming: bool
    progress: Progress | None
    now: datetime

    def run(self, cache_key: str, sources: Sequence[Source], eval_sources: Sequence[Source]) -> Ready:
        """Prepare sources from the beginning and keep the result under a key of the cache."""
        with store.new_folder(cache_key) as folder:
            # Held-out rows are a share of the training sources' rows, or all rows of sources of their own.
            # Weights between 0 and 1 take a column; 0 and 1 are in the labels.
            weighted = 0 < self.section.prompt_weight < 1
            compares = self.section.has_eval_rows
            train = Part(SequenceWriter(folder / TRAIN, weighted=weighted), compares)
            held_out = Part(SequenceWriter(folder / EVAL, weighted=weighted), compares) if compares else None
            found = self._read(sources, train, held_out if self.section.eval_fraction is not None else None)
            found_eval = self._read(eval_sources, held_out) if held_out is not None else []
            for part in (train, held_out):
                if part is not None:
                    part.writer.close()
            eos = self.tokenizer.eos_token
            # The tokenizer's own end token ends a response too, whatever the templates write.
            stated = [end for facts in found + found_eval for end in (facts["end"], facts["end_of_call"])]
            ends = {end for end in stated if end is not None} | {eos}
            overlap, near = held_out.rows_in(train) if held_out else (0, 0)
            state: State = {
                "train": train.tally.to_dict(),
                "train_sha256": train.digest.hexdigest(),
                "train_tokens_sha256": train.tokens.hexdigest(),
                "eval": held_out.tally.to_dict() if held_out else None,
                "eval_sha256": held_out.digest.hexdigest() if held_out else None,
                "eval_tokens_sha256": held_out.tokens.hexdigest() if held_out else None,
                "sources": found,
                "eval_sources": found_eval,
                "overlap": overlap,
                "near": near,
                "stop_token_ids": sorted(map(self._id_of, ends)),
                "eos_token": eos,
            }
            return _opened(store.keep(folder, cache_key, state), state)

    def _id_of(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(found, int)  # a list for a list of tokens
        return found

    def _read(self, sources: Sequence[Source], part: Part, held_out: Part | None = None) -> list[SourceFacts]:
        """Prepare the rows of sources into a part of the data, or a share of them into ``held_out``.

        Raises:
            UserInputError: If a source cannot be read at all, or fits no format. Bad rows are counted, not raised.
            RunFailed: If the disk is full.
        """
        found: list[SourceFacts] = []
        for index, source in enumerate(sources):
            reader, rows = with_reader(source, streaming=self.streaming)
            # A worker for each source, since the format and the template may differ.
            template = chosen_template(source.prompt_template, reader, self.tokenizer, self.section)
            worker = RowWorker(self.tokenizer, reader.format, template, self.section, self.now, reader)
            prefix = f"{Path(source.path).name}, " if len(sources) > 1 else ""
            count, unused = 0, NotUsed()
            for outcomes in map_rows(worker, rows, self.num_proc, row_size):
                # ``held_out`` is given only if it gets a share of these rows; otherwise none of them is held out.
                share = self.section.eval_fraction if held_out is not None else None
                kept, out = _divided(outcomes, share or 0.0, source.weight)
                _write(part, kept, index, prefix)
                if held_out is not None:
                    _write(held_out, out, index, prefix)
                count += len(outcomes)
                unused.add(outcomes)
                if self.progress:
                    self.progress(len(outcomes))
            found.append(facts_of(source, reader, template, count, worker.template, unused))
        return found


def _divided(
    outcomes: Sequence[Outcome], eval_fraction: float, weight: float
) -> tuple[list[tuple[Outcome, int]], list[tuple[Outcome, int]]]:
    """Divide into training and held-out rows, each with its uses per epoch; unreadable rows count as training rows."""
    train, held_out = [], []
    for outcome in outcomes:
        if outcome.hash is not None and unit_interval(outcome.hash[:8]) < eval_fraction:
            held_out.append((outcome, 1))  # weights are for training rows alone
        else:
            train.append((outcome, _times(outcome, weight)))
    return train, held_out


def _times(outcome: Outcome, weight: float) -> int:
    whole = math.floor(weight)
    if outcome.hash is None or whole == weight:
        return whole
    # Other bytes than those that decide the held-out share, so that the two choices are independent.
    return whole + (unit_interval(outcome.hash[8:]) < weight - whole)


def unit_interval(digest: bytes) -> float:
    """Map the first 8 bytes of a hash to a number in [0, 1).

    A row is held out if its number is below the fraction to hold out. So the same row falls on the same side on every
    machine, in any order and among any other rows, and exact duplicates are never on both sides.
    """
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass
class Part:
    """Training rows, or held-out ones, while they are written.

    Attributes:
        writer: Writes the sequences.
        compares: Whether to keep what `rows_in` compares.
        tally: Counts the rows.
        first_rows: What a row became, to the (source, number) of the first row that became the same.
        used: Of every row that is used at all: the digests of its sequences, and the hash of its request.
        digest: SHA-256 over what the rows say, in order.
        tokens: SHA-256 over the tokens of the sequences, and which of them are trained, in order.
    """

    writer: SequenceWriter
    compares: bool = False
    tally: Tally = field(default_factory=Tally)
    first_rows: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    used: list[tuple[tuple[bytes, ...], bytes | None]] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)
    tokens: Any = field(default_factory=hashlib.sha256)

    def add(self, outcomes: Sequence[tuple[Outcome, int]], source: int, prefix: str) -> None:
        """Add rows of one source, each with its uses per epoch; ``prefix`` goes before their places in messages."""
        sequences, rows = [], []
        for outcome, times in outcomes:
            self.tally.add(outcome.placed(prefix), self._earlier(outcome, source), times)
            # With a weight below 1 a row may not be used at all, and then it is none that a held-out row repeats.
            if self.compares and outcome.sums and times:
                self.used.append((outcome.sums, outcome.prompt))
            for found in outcome.sums * times:
                self.tokens.update(found)
            sequences += list(outcome.sequences) * times
            rows += [outcome.number] * (len(outcome.sequences) * times)
        self.writer.write(sequences, source, rows)

    def rows_in(self, other: Part) -> tuple[int, int]:
        """Count the rows of which another part has a sequence, and the others that begin with a request of its rows."""
        sequences = {found for sums, _ in other.used for found in sums}
        requests = {prompt for _, prompt in other.used if prompt is not None}
        same = [any(found in sequences for found in sums) for sums, _ in self.used]
        near = [prompt in requests for _, prompt in self.used]
        return sum(same), sum(is_near and not is_same for is_near, is_same in zip(near, same, strict=True))

    def _earlier(self, outcome: Outcome, source: int) -> str | None:
        """Return the earlier row that became the same, in words; None for the first of its kind."""
        if outcome.hash is None:
            return None
        self.digest.update(outcome.hash)
        # By what is trained: an id or a date that no template writes makes no other row. One that is left out became
        # nothing, and is known by what it says.
        became = b"".join(outcome.sums) or outcome.hash
        first = self.first_rows.setdefault(became, (source, outcome.number))
        if first == (source, outcome.number):
            return None
        return f"row {first[1]}" + (f" of source {first[0] + 1}" if first[0] != source else "")


def _write(part: Part, outcomes: Sequence[tuple[Outcome, int]], index: int, prefix: str) -> None:
    try:
        part.add(outcomes, index, prefix)
    except OSError as error:
        raise RunFailed(
            f"the prepared data cannot be written to {str(part.writer.path.parent)!r} ({error.strerror or error}). "
            "Free space there, or set HF_DATASETS_CACHE to a folder that has some, and run the same command again."
        ) from error
