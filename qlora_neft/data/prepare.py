"""A recipe's data section carried out: training and held-out sequences, counted, checked and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..files.suffixes import JINJA_SUFFIXES
from . import cache
from .build import Part, Progress, build
from .gate import DataRefused, Limits
from .reading import source_fingerprint
from .report import data_report
from .sources import Source
from .store import SequenceWriter, read_sequences
from .tally import Tally
from .templates import read_jinja
from .worker import Settings

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
