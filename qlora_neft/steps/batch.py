"""One optimizer step's sequences, split into micro-batches of their own size.

The dataloader hands out whole steps. How a step is split (by rows, by tokens, by length) is how it is run, not what
is learned: a sequence keeps its ordinal in the step, and the loss is normalized by the tokens of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UserInputError
from . import IGNORE_INDEX, LOSS_WEIGHTS
from .sequences import SequenceSpan, UnknownSequenceBoundaries, count_tokens, find_sequences
from .weights import TOKENS, per_sequence, total_weight

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GHOST = "_ghost"  # key of a row that is here only because a rank without a row must take part in the step

Row = Mapping[str, Any]
Collator = Callable[[list], dict[str, Any]]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass.

    Attributes:
        inputs: What the collator made of the rows, on the CPU.
        spans: Its sequences, ordinals counted through this rank's part of the step; None if the batch does not say
            where they are (harmless unless there is noise to scale).
        num_means: Sequences that train anything, where a step's loss is the mean over them; None for one over tokens.
    """

    inputs: dict[str, Any]
    spans: list[SequenceSpan] | None
    num_means: int | None = None

    def pin_memory(self) -> MicroBatch:
        """Return it in page-locked memory, from which it moves to a GPU while the host goes on."""
        pinned = {
            key: value.pin_memory() if hasattr(value, "pin_memory") else value for key, value in self.inputs.items()
        }
        return replace(self, inputs=pinned)

    def num_trained_tokens(self) -> int:
        """Count positions with a label, as a causal LM does: the first of a row has nothing to predict it."""
        return int(self.inputs["labels"][..., 1:].ne(IGNORE_INDEX).sum())

    def total_weight(self) -> float:
        """Return what its loss is divided by, if it is a step of its own: trained tokens, each with its weight."""
        return total_weight(self.inputs) if self.num_means is None else self.num_means


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches of one optimizer step on one rank.

    Attributes:
        micro_batches: In the order of the forward passes.
        rows: The rows they were made of, for `split_again`; empty in a ready-made batch.
        collator: What split and collated them; None in a ready-made batch.
    """

    micro_batches: tuple[MicroBatch, ...]
    rows: tuple[Row, ...] = ()
    collator: StepCollator | None = None

    @classmethod
    def of(cls, inputs: dict[str, Any], loss_mean: str = TOKENS) -> StepBatch:
        """Make a step of one ready-made batch, for callers that bring their own."""
        return cls((_micro_batch(inputs, _spans_or_none(inputs), loss_mean),))

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)

    def __len__(self) -> int:
        return len(self.micro_batches)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StepBatch:
        """Stay on the CPU: each micro-batch moves when its turn comes, so only one is on the device at a time."""
        return self

    def pin_memory(self) -> StepBatch:
        """Pin every micro-batch; torch's dataloader calls it under ``dataloader_pin_memory``."""
        return replace(self, micro_batches=tuple(micro.pin_memory() for micro in self.micro_batches))

    def split_again(self, max_rows: int, max_tokens: int | None) -> StepBatch:
        """Split the same step into other micro-batches; every sequence keeps its ordinal, a ready-made batch stays."""
        if self.collator is None:
            return self
        # The collator numbers sequences by their rows' places, which another split leaves as they are.
        return replace(self.collator, max_rows=max_rows, max_tokens=max_tokens)(list(self.rows))

    def num_sequences(self) -> int:
        """Count the sequences of the step on this rank, packed documents one by one."""
        return sum(len(micro.spans or ()) for micro in self.micro_batches)

    def num_tokens(self) -> int:
        """Count the real tokens of the step on this rank; 0 if the batch does not say."""
        return sum(count_tokens(micro.spans or ()) for micro in self.micro_batches)

    def num_trained_tokens(self) -> int:
        """Count the tokens with a label of the step on this rank."""
        return sum(micro.num_trained_tokens() for micro in self.micro_batches)

    def total_weight(self) -> float:
        """Return what the loss of this rank's part of the step is divided by."""
        return sum(micro.total_weight() for micro in self.micro_batches)


@dataclass(frozen=True)
class StepCollator:
    """Collate function of the training dataloader: turns the rows of a step into a `StepBatch`.

    Attributes:
        collator: Collates the rows of one micro-batch (TRL's, or the user's own).
        max_rows: Maximum rows per micro-batch.
        max_tokens: Maximum tokens per micro-batch, padding counted; None for no limit. A single row may exceed it.
        padding_free: Whether ``collator`` flattens, so that padding costs nothing.
        loss_mean: What the step's loss is the mean of: ``"tokens"``, or ``"sequences"`` of the means over each.
    """

    collator: Collator
    max_rows: int
    max_tokens: int | None = None
    padding_free: bool = False
    loss_mean: str = TOKENS

    def __call__(self, rows: list[Row]) -> StepBatch:
        """Split the rows, collate each part, and number the sequences by the place of their row in the step."""
        lengths = [_row_length(row) for row in rows]
        # By their places in the step, before anything is sorted: how a step is split must not change its noise.
        first_ordinals = _first_ordinals(rows)
        micro_batches = tuple(
            # Copies of the rows: a collator may pop their keys, and the step may have to be split again.
            self._micro_batch([dict(rows[i]) for i in part], [first_ordinals[i] for i in part])
            for part in split_rows(lengths, self.max_rows, self.max_tokens, padded=not self.padding_free)
        )
        return StepBatch(micro_batches, tuple(rows), self)

    def _micro_batch(self, rows: list[dict[str, Any]], first_ordinals: list[int]) -> MicroBatch:
        if rows[0].pop(GHOST, False):  # the only row of this rank's step
            inputs = self.collator(rows)
            # The forward and backward pass still run, so that this rank joins the others' exchange of gradients.
            inputs["labels"].fill_(IGNORE_INDEX)
            return MicroBatch(inputs, [], None if self.loss_mean == TOKENS else 0)
        num_tokens = sum(_row_length(row) for row in rows)  # read before a collator may pop keys
        counts = [_num_documents(row) for row in rows]
        inputs = self.collator(rows)
        spans = _spans_or_none(inputs, num_tokens or None)
        ordinals = [first + k for first, count in zip(first_ordinals, counts, strict=True) for k in range(count)]
        if spans is not None and len(spans) == len(ordinals):
            spans = [span.shifted(ordinal - span.ordinal) for span, ordinal in zip(spans, ordinals, strict=True)]
        elif spans is not None:  # a collator that merges rows: ordinals that no row of another micro-batch has
            spans = [span.shifted((first_ordinals[0] + 1) << 16) for span in spans]
        return _micro_batch(inputs, spans, self.loss_mean)


def split_rows(
    lengths: Sequence[int], max_rows: int, max_tokens: int | None = None, *, padded: bool = True
) -> list[list[int]]:
    """Split the rows of a step into micro-batches, longest rows first, so that like is padded with like.

    Longest first also means that a step which does not fit in memory fails on its first micro-batch.

    Args:
        lengths: Tokens per row.
        max_rows: Maximum rows per micro-batch.
        max_tokens: Maximum tokens per micro-batch, or None; a row longer than that gets one of its own.
        padded: Whether rows are padded to the longest of their micro-batch; else they are flattened.

    Returns:
        Row indices of each micro-batch; together every row once.
    """
    # Ties in the rows' own order: the split is the same on every machine.
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    parts: list[list[int]] = []
    for i in order:
        if not parts or not _fits(parts[-1], i, lengths, max_rows, max_tokens, padded):
            parts.append([])
        parts[-1].append(i)
    return parts


def check_labels(step: StepBatch, tokenizer: PreTrainedTokenizerBase | Any) -> None:
    """Check that a step trains something, and that its end tokens are not masked as padding.

    A collator that masks every pad token (transformers' ``DataCollatorForLanguageModeling``) also masks the end token
    if the two are one and the same; a model trained that way never stops.

    Args:
        step: The first step, collated.
        tokenizer: Without ``eos_token_id``, as some processors are, only the first rule is checked.

    Raises:
        UserInputError: If no token has a label, or pad is the end token and no end token has a label.
    """
    if step.num_trained_tokens() == 0:
        raise UserInputError(
            "train_dataset: the first optimizer step has no label, so nothing would be learned. Look at the labels: "
            "all are -100, or every response lies behind max_length."
        )
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None or getattr(tokenizer, "pad_token_id", None) != end:
        return
    # A step without any end token, as when all rows are cut, proves nothing.
    has_ends = any(_has_end(micro.inputs, end) for micro in step)
    if has_ends and not any(_trains_end(micro.inputs, end) for micro in step):
        raise UserInputError(
            "data_collator: pad token and end token are one, and the collator masks both: the model would never learn "
            "to stop. Give the tokenizer another pad token, or leave data_collator to the trainer."
        )


# ---- Rows and batches ----


def _micro_batch(inputs: dict[str, Any], spans: list[SequenceSpan] | None, loss_mean: str) -> MicroBatch:
    """Return a micro-batch, weighted by what a step's loss is the mean of."""
    inputs = _without_first_labels(inputs, spans)
    if loss_mean == TOKENS or "labels" not in inputs:
        return MicroBatch(inputs, spans)
    # Unknown boundaries raise here: without them there is no mean over sequences.
    weights, count = per_sequence(inputs, find_sequences(inputs) if spans is None else spans)
    return MicroBatch({**inputs, LOSS_WEIGHTS: weights}, spans, count)


def _without_first_labels(inputs: dict[str, Any], spans: list[SequenceSpan] | None) -> dict[str, Any]:
    """Return a batch in which no sequence's first token has a label: padding on the left cannot predict it."""
    labels = inputs.get("labels")
    firsts = [(span.row, _first(span)) for span in spans or () if span.length]
    # In the first column a label is not trained anyway, and most batches have no other.
    wrong = [] if labels is None else [at for at in firsts if at[1] > 0 and labels[at] != IGNORE_INDEX]
    if labels is None or not wrong:
        return inputs
    labels = labels.clone()  # a collator may give out one tensor as labels and as ids
    for at in wrong:
        labels[at] = IGNORE_INDEX
    return {**inputs, "labels": labels}


def _first(span: SequenceSpan) -> int:
    return span.tokens.start if isinstance(span.tokens, slice) else int(span.tokens[0])


def _fits(part: list[int], i: int, lengths: Sequence[int], max_rows: int, max_tokens: int | None, padded: bool) -> bool:
    if len(part) >= max_rows:
        return False
    if max_tokens is None:
        return True
    rows = [*part, i]
    # Padded: a rectangle as wide as its longest row. Flattened: the tokens alone.
    size = len(rows) * max(lengths[j] for j in rows) if padded else sum(lengths[j] for j in rows)
    return size <= max_tokens


def _row_length(row: Row) -> int:
    # A row that its collator tokenizes has no length yet; such rows are split by their number alone.
    return len(row["input_ids"]) if "input_ids" in row else 0


def _num_documents(row: Row) -> int:
    """Count the sequences in a row: TRL's packing writes their lengths beside it."""
    return len(row["seq_lengths"]) if row.get("seq_lengths") is not None else 1


def _first_ordinals(rows: Sequence[Row]) -> list[int]:
    ordinals, count = [], 0
    for row in rows:
        ordinals.append(count)
        count += _num_documents(row)
    return ordinals


def _spans_or_none(inputs: Mapping[str, Any], num_tokens: int | None = None) -> list[SequenceSpan] | None:
    try:
        # No error yet: without noise nobody needs the boundaries.
        return find_sequences(inputs, num_tokens=num_tokens)
    except UnknownSequenceBoundaries:
        return None


def _has_end(inputs: Mapping[str, Any], end: int) -> bool:
    """Whether an end token is no padding; the first of a row does not count: it may be a begin token as well."""
    found = inputs["input_ids"].eq(end)  # (B, T)
    if inputs.get("attention_mask") is not None and inputs["attention_mask"].shape == found.shape:
        # Pad tokens are equal to end tokens here; the mask tells them apart.
        found = found & inputs["attention_mask"].bool()
    return bool(found[..., 1:].any())


def _trains_end(inputs: Mapping[str, Any], end: int) -> bool:
    return bool(inputs["labels"][..., 1:].eq(end).any())  # an end token is not IGNORE_INDEX
