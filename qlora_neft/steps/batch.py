"""One optimizer step's sequences, split into micro-batches of their own size.

The dataloader hands out whole steps. How a step is split (by rows, by tokens, by length) is how it is run, not what
is learned: a sequence keeps its ordinal in the step, and the loss is normalized by the tokens of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserInputError
from .rows import GHOST
from .sequences import IGNORE_INDEX, SequenceSpan, UnknownSequenceBoundaries, count_tokens, find_sequences

Features = Sequence[Mapping[str, Any]]
Collator = Callable[[list], dict[str, Any]]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass.

    Attributes:
        inputs: What the collator made of the rows, on the CPU.
        spans: Its sequences, ordinals counted through this rank's part of the step; None where the batch does not
            say (harmless unless there is noise to scale).
    """

    inputs: dict[str, Any]
    spans: list[SequenceSpan] | None

    def num_trained_tokens(self) -> int:
        """Positions with a label, as a causal LM counts them: the first of a row has nothing to predict it."""
        return int(self.inputs["labels"][..., 1:].ne(IGNORE_INDEX).sum())


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches of one optimizer step on one rank.

    Attributes:
        micro_batches: In the order of the forward passes.
        features, collator: The rows and what split them, to split them again; absent in a ready-made batch.
    """

    micro_batches: tuple[MicroBatch, ...]
    features: tuple[Mapping[str, Any], ...] = ()
    collator: StepCollator | None = None

    def to(self, device: Any, non_blocking: bool = False) -> StepBatch:
        """Stay on the CPU: each micro-batch moves when its turn comes, so only one is on the device at a time."""
        return self

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)

    def __len__(self) -> int:
        return len(self.micro_batches)

    def num_sequences(self) -> int:
        """Sequences in the step on this rank, packed documents counted one by one."""
        return sum(len(micro.spans or ()) for micro in self.micro_batches)

    def num_tokens(self) -> int:
        """Real tokens in the step on this rank; 0 where the batch does not say."""
        return sum(count_tokens(micro.spans or ()) for micro in self.micro_batches)

    def num_trained_tokens(self) -> int:
        """Tokens with a label in the step on this rank."""
        return sum(micro.num_trained_tokens() for micro in self.micro_batches)

    def split_again(self, max_rows: int, max_tokens: int | None) -> StepBatch:
        """The same step in smaller micro-batches; every sequence keeps its ordinal. A ready-made batch stays whole."""
        if self.collator is None:
            return self
        return replace(self.collator, max_rows=max_rows, max_tokens=max_tokens)(list(self.features))

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> StepBatch:
        """A step of one ready-made batch, for callers that bring their own."""
        return cls((MicroBatch(inputs, _spans_or_none(inputs)),))


@dataclass(frozen=True)
class StepCollator:
    """Collate function of the training dataloader: the rows of a step to a `StepBatch`.

    Attributes:
        collator: Collates the rows of one micro-batch (TRL's, or the user's own).
        max_rows: Rows per micro-batch at most.
        max_tokens: Tokens per micro-batch at most, padding counted; None for no limit. One row may exceed it alone.
        padding_free: Whether ``collator`` flattens, so that padding costs nothing.
    """

    collator: Collator
    max_rows: int
    max_tokens: int | None = None
    padding_free: bool = False

    def __call__(self, features: list[Mapping[str, Any]]) -> StepBatch:
        """Split, collate each part, and number the sequences by the place of their row in the step."""
        lengths = [_row_length(row) for row in features]
        first_ordinals = _first_ordinals(features)
        micro_batches = tuple(
            # Copies of the rows: a collator may pop their keys, and the step may have to be split again.
            self._micro_batch([dict(features[i]) for i in rows], [first_ordinals[i] for i in rows])
            for rows in split_rows(lengths, self.max_rows, self.max_tokens, padded=not self.padding_free)
        )
        return StepBatch(micro_batches, tuple(features), self)

    def _micro_batch(self, features: list, first_ordinals: list[int]) -> MicroBatch:
        if features[0].pop(GHOST, False):
            inputs = self.collator(features)
            inputs["labels"].fill_(IGNORE_INDEX)
            return MicroBatch(inputs, [])
        num_tokens = sum(_row_length(row) for row in features)  # read before a collator may pop keys
        counts = [_num_documents(row) for row in features]
        inputs = self.collator(features)
        spans = _spans_or_none(inputs, num_tokens or None)
        ordinals = [first + k for first, count in zip(first_ordinals, counts, strict=True) for k in range(count)]
        if spans is not None and len(spans) == len(ordinals):
            spans = [span.shifted(ordinal - span.ordinal) for span, ordinal in zip(spans, ordinals, strict=True)]
        elif spans is not None:  # a collator that merges rows: ordinals that no row of another micro-batch has
            spans = [span.shifted((first_ordinals[0] + 1) << 16) for span in spans]
        return MicroBatch(inputs, spans)


def check_labels(step: StepBatch, tokenizer: Any) -> None:
    """Check that a step trains something, and that its end tokens are not masked as padding.

    A collator that masks every pad token (transformers' ``DataCollatorForLanguageModeling``) also masks the end token
    if the two are one and the same; a model trained that way never stops.

    Args:
        step: The first step, collated.
        tokenizer: With ``pad_token_id`` and ``eos_token_id``.

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
    if any(_num_ends(micro.inputs, end) for micro in step) and not any(
        _num_trained_ends(micro.inputs, end) for micro in step
    ):
        raise UserInputError(
            "data_collator: pad token and end token are one, and the collator masks both: the model would never learn "
            "to stop. Give the tokenizer another pad token, or leave data_collator to the trainer."
        )


def _num_ends(inputs: Mapping[str, Any], end: int) -> int:
    """End tokens that are no padding; the first of a row does not count, since it may be a begin token as well."""
    found = inputs["input_ids"].eq(end)  # (B, T)
    if inputs.get("attention_mask") is not None and inputs["attention_mask"].shape == found.shape:
        found = found & inputs["attention_mask"].bool()
    return int(found[..., 1:].sum())


def _num_trained_ends(inputs: Mapping[str, Any], end: int) -> int:
    labels = inputs["labels"]
    return int((labels.eq(end) & labels.ne(IGNORE_INDEX))[..., 1:].sum())


def split_rows(
    lengths: Sequence[int], max_rows: int, max_tokens: int | None = None, *, padded: bool = True
) -> list[list[int]]:
    """Split the rows of a step into micro-batches, longest rows first, so that like is padded with like.

    Longest first also means that a step which does not fit in memory fails on its first micro-batch.

    Args:
        lengths: Tokens per row.
        max_rows: Rows per micro-batch at most.
        max_tokens: Tokens per micro-batch at most, or None; a row longer than that gets one of its own.
        padded: Whether rows are padded to the longest of their micro-batch; else they are flattened.

    Returns:
        Row indices of each micro-batch; together every row once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    parts: list[list[int]] = []
    for i in order:
        if not parts or not _fits(parts[-1], i, lengths, max_rows, max_tokens, padded):
            parts.append([])
        parts[-1].append(i)
    return parts


def _fits(part: list[int], i: int, lengths: Sequence[int], max_rows: int, max_tokens: int | None, padded: bool) -> bool:
    if len(part) >= max_rows:
        return False
    if max_tokens is None:
        return True
    rows = [*part, i]
    size = len(rows) * max(lengths[j] for j in rows) if padded else sum(lengths[j] for j in rows)
    return size <= max_tokens


def _row_length(row: Mapping[str, Any]) -> int:
    return len(row["input_ids"]) if "input_ids" in row else 0


def _num_documents(row: Mapping[str, Any]) -> int:
    return len(row["seq_lengths"]) if row.get("seq_lengths") is not None else 1


def _first_ordinals(features: Features) -> list[int]:
    ordinals, count = [], 0
    for row in features:
        ordinals.append(count)
        count += _num_documents(row)
    return ordinals


def _spans_or_none(inputs: Mapping[str, Any], num_tokens: int | None = None) -> list[SequenceSpan] | None:
    try:
        return find_sequences(inputs, num_tokens=num_tokens)
    except UnknownSequenceBoundaries:
        return None
