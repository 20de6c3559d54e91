"""The data report: a run's data in numbers, written as ``data_report.json`` and shown by ``preview``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from typing_extensions import TypedDict

from ..paths import JINJA_SUFFIXES
from ..recipe.schema import Data
from ..steps.batch import split_rows
from .columns import listed
from .gate import Tally, find_problems, find_warnings
from .store import SEQUENCE_KEYS, SourceFacts, State
from .worker import EMPTY, NO_ROOM, ONLY_END, UNFIT

REPORT_VERSION = 1
# Keys of the data section that the report repeats under ``settings``: those that decide sequences, without the older
# spelling of a weight that is stated anyway, and those of the gate.
SETTINGS = (
    *(key for key in SEQUENCE_KEYS if key != "train_on_prompt"),
    "max_dropped_fraction",
    "max_truncated_fraction",
    "max_duplicate_fraction",
)
PERCENTILES = (5, 25, 50, 75, 95, 99)
MAX_BINS = 24
BIN_WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
WASTE_STEPS = 200  # optimizer steps over which padding is counted


class Histogram(TypedDict):
    """Counts of sequences by length: ``edges`` in tokens, one more than bins, and the ``counts`` of the bins."""

    edges: list[int]
    counts: list[int]


class PartReport(TypedDict):
    """One part of the data, training or held out, in numbers.

    ``rows`` are sequences and ``source_rows`` the rows they were made from; ``sha256`` is that of the rows' contents,
    ``tokens_sha256`` that of their tokens and which of them are trained.
    ``padding_waste`` comes with the plan of a run, see `padding_waste`.
    """

    rows: int
    source_rows: int
    tokens: int
    trained_tokens: int
    share_trained: float
    truncated: int
    truncated_fraction: float
    dropped: int
    empty: int
    unfit: int
    without_room: int
    only_end: int
    texts_split: int
    chunks: int
    duplicates: int
    ended: int
    lengths: dict[str, float | int | None]
    histogram: Histogram
    sha256: str
    tokens_sha256: str
    padding_waste: NotRequired[dict[str, float]]


class DataReport(TypedDict):
    """The content of ``data_report.json``: the training part's main counts, the gate's verdict, and both parts."""

    report_version: int
    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    problems: list[str]
    warnings: list[str]
    settings: dict[str, Any]
    sources: list[SourceFacts]
    train: PartReport
    eval: PartReport | None


def data_report(state: State, train: Dataset, held_out: Dataset | None, section: Data) -> DataReport:
    """Return the report of prepared data, see `prepare_data`.

    Args:
        state: What the preparation found.
        train, held_out: The sequences.
        section: The recipe's data section, with the shares of rows it allows to be cut, left out or repeated.
    """
    tally = Tally.from_dict(state["train"])
    described = _part(train, tally, state["train_sha256"], state["train_tokens_sha256"])
    key = _named("data.path", state["sources"])
    problems = find_problems(tally, section, key)
    warnings = find_warnings(tally, section, key) + _warnings_on_ends(state)
    warnings += _not_used(state["sources"], "data.path")
    eval_described = None
    if held_out is not None:
        # Stored with the held-out sequences.
        assert state["eval"] is not None and state["eval_sha256"] is not None
        assert state["eval_tokens_sha256"] is not None
        eval_tally = Tally.from_dict(state["eval"])
        eval_described = _part(held_out, eval_tally, state["eval_sha256"], state["eval_tokens_sha256"])
        # Held out as a share, the rows are of the training rows' source, whose problems are stated already.
        if section.eval_fraction is None:
            eval_key = _named("data.eval_path", state["eval_sources"])
            problems += find_problems(eval_tally, section, eval_key)
            warnings += find_warnings(eval_tally, section, eval_key)
            # Once: the two files are mostly of one kind.
            warnings += [line for line in _not_used(state["eval_sources"], "data.eval_path") if line not in warnings]
        # Rows go to a side by their hash, so a few rows may all go to one.
        elif not problems and not (tally.sequences and eval_tally.sequences):
            problems.append(
                f"data.eval_fraction: {section.eval_fraction:g} of {tally.rows + eval_tally.rows} rows leaves no "
                "rows on one side. Give more rows or another fraction."
            )
        warnings += _warnings_on_overlap(state, section)
    problems += _values_without_effect(state, section)
    return {
        "report_version": REPORT_VERSION,
        "rows": described["rows"],
        "tokens": described["tokens"],
        "trained_tokens": described["trained_tokens"],
        "truncated": described["truncated"],
        "problems": problems,
        "warnings": warnings,
        "settings": {key: getattr(section, key) for key in SETTINGS} | {"prompt_loss_weight": section.prompt_weight},
        "sources": state["sources"],
        "train": described,
        "eval": eval_described,
    }


def _warnings_on_ends(state: State) -> list[str]:
    other = sorted({d["end"] for d in state["sources"] if d["end"] not in (None, state["eos_token"])})
    return [
        f"data.prompt_template: responses end with {end}, and the tokenizer's end token is {state['eos_token']}: a "
        "program that stops at the latter alone will let the model run on."
        for end in other
    ] + [
        f"data.prompt_template: {d['prompt_template']!r} writes no begin token, and the tokenizer puts "
        f"{d['lacks_begin']} before a text. Begin the file with {{{{ bos_token }}}}, unless the base was trained "
        "without."
        for d in state["sources"]
        if d["lacks_begin"] is not None
    ]


def _values_without_effect(state: State, section: Data) -> list[str]:
    """Return a line if there are values for chat templates and no rows have one."""
    named = dict.fromkeys(facts["prompt_template"] for facts in state["sources"] + state["eval_sources"])
    if not section.chat_template_kwargs or any(name == "chat" or name.endswith(JINJA_SUFFIXES) for name in named):
        return []
    return [
        f"data.chat_template_kwargs: no rows have a chat template, they get {', '.join(named)}. Remove it, or set "
        "data.prompt_template to chat or a .jinja file."
    ]


def _warnings_on_overlap(state: State, section: Data) -> list[str]:
    """Return what makes the held-out loss look better than it is."""
    key = "data.eval_path" if section.eval_path else "data.eval_split" if section.eval_split else "data.eval_fraction"
    found = []
    if same := state["overlap"]:
        rows = "1 held-out row is a training row" if same == 1 else f"{same:,} held-out rows are training rows"
        found.append(f"{key}: {rows} as well; the held-out loss is too good by {'it' if same == 1 else 'them'}.")
    if near := state["near"]:
        rows, go = ("1 held-out row begins", "goes") if near == 1 else (f"{near:,} held-out rows begin", "go")
        found.append(f"{key}: {rows} with the request of a training row and {go} on otherwise.")
    return found


def _not_used(sources: Sequence[SourceFacts], key: str) -> list[str]:
    """Return a line for each source with columns, or keys of messages, that nothing is read from."""
    lines = []
    for source in sources:
        said = {"columns": source["columns_not_used"], "keys of messages": source["keys_not_used"]}
        found = [f"{what} not used: {listed(names)}" for what, names in said.items() if names]
        if found:
            lines.append(f"{key}: {source['path']!r}: {'; '.join(found)}. data.columns says what a column is.")
    return lines


def _named(key: str, sources: Sequence[SourceFacts]) -> str:
    return f"{key}: {sources[0]['path']!r}" if len(sources) == 1 else key


def _part(dataset: Dataset, tally: Tally, sha256: str, tokens_sha256: str) -> PartReport:
    """Return the numbers of one part of the data; the hashes are those of its rows' contents and of their tokens."""
    lengths = sequence_lengths(dataset)
    truncated = tally.finding("truncated").count
    return {
        "rows": tally.sequences,
        "source_rows": tally.rows,
        "tokens": tally.tokens,
        "trained_tokens": tally.trained_tokens,
        "share_trained": tally.trained_tokens / tally.tokens if tally.tokens else 0.0,
        "truncated": truncated,
        "truncated_fraction": truncated / tally.rows if tally.rows else 0.0,
        "dropped": tally.num_dropped(),
        "empty": tally.finding(EMPTY).count,
        "unfit": tally.finding(UNFIT).count,
        "without_room": tally.finding(NO_ROOM).count,
        "only_end": tally.finding(ONLY_END).count,
        "texts_split": tally.texts_split,
        "chunks": tally.chunks,
        "duplicates": tally.finding("duplicate").count,
        "ended": tally.ended,
        "lengths": percentiles(lengths),
        "histogram": histogram(lengths),
        "sha256": sha256,
        "tokens_sha256": tokens_sha256,
    }


# ---- Lengths ----


def sequence_lengths(dataset: Dataset) -> np.ndarray:
    """Return the number of tokens of each sequence, int64 (N,), without reading the tokens."""
    lengths = pc.call_function("list_value_length", [dataset.data.column("input_ids")])
    return np.asarray(lengths, dtype=np.int64)


def histogram(lengths: np.ndarray) -> Histogram:
    """Count lengths in bins of one width, a power of two."""
    if not len(lengths):
        return {"edges": [], "counts": []}
    longest = int(lengths.max())
    # The narrowest bins of which no more than MAX_BINS are needed.
    width = next((w for w in BIN_WIDTHS if longest // w < MAX_BINS), BIN_WIDTHS[-1])
    counts = np.bincount(lengths // width)
    return {"edges": [width * i for i in range(len(counts) + 1)], "counts": counts.tolist()}


def padding_waste(
    lengths: np.ndarray, batch_size: int, max_rows: int, max_tokens: int | None, *, padding_free: bool, seed: int = 0
) -> dict[str, float]:
    """Return the share of computed positions that are padding, over some shuffled optimizer steps.

    Args:
        lengths: Number of tokens of each sequence.
        batch_size: Sequences per optimizer step.
        max_rows, max_tokens: Limits of a micro-batch, as the trainer splits the step.
        padding_free: Whether sequences are joined instead of padded.
        seed: Seed of the order.

    Returns:
        ``random_batches``, each step padded to its longest sequence; ``as_run``, split as the trainer splits it.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))[: WASTE_STEPS * batch_size]
    steps = [lengths[order[start : start + batch_size]].tolist() for start in range(0, len(order), batch_size)]
    real = sum(map(sum, steps))
    naive = sum(len(step) * max(step) for step in steps)
    split = sum(_computed(step, max_rows, max_tokens) for step in steps)
    waste = {"random_batches": naive, "as_run": real if padding_free else split}
    # Positions are what is computed: tokens and padding.
    return {name: round(1 - real / positions, 4) if positions else 0.0 for name, positions in waste.items()}


def _computed(step: Sequence[int], max_rows: int, max_tokens: int | None) -> int:
    parts = split_rows(step, max_rows, max_tokens)
    return sum(len(part) * max(step[i] for i in part) for part in parts)


def percentiles(lengths: np.ndarray) -> dict[str, float | int | None]:
    """Return ``min``, ``p5``, ..., ``max`` and ``mean`` of lengths in tokens; each None without any."""
    names = [f"p{percent}" for percent in PERCENTILES]
    if not len(lengths):
        return dict.fromkeys(("min", *names, "max", "mean"))
    # "higher" gives a length that occurs, not one between two.
    values = [int(value) for value in np.percentile(lengths, PERCENTILES, method="higher")]
    found = dict(zip(names, values, strict=True))
    return {"min": int(lengths.min()), **found, "max": int(lengths.max()), "mean": round(float(lengths.mean()), 1)}
