"""Where each sequence of a batch lies: padded left or right, packed, or flattened padding-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceSpan:
    """One sequence inside a batch of token ids of shape (B, T).

    Attributes:
        row: Its row in the batch.
        tokens: Its columns: a slice, or an index tensor (L,) where the mask has holes.
        length: L, its real tokens; padding is never counted.
        ordinal: Its place in the whole optimizer step, across micro-batches and ranks.
    """

    row: int
    tokens: slice | Tensor
    length: int
    ordinal: int

    def shifted(self, offset: int) -> SequenceSpan:
        """Return the same span, ``offset`` sequences later in the step."""
        return replace(self, ordinal=self.ordinal + offset)


class UnknownSequenceBoundaries(ValueError):
    """A batch does not say where its sequences begin and end, so L is unknown."""


def find_sequences(inputs: Mapping[str, Any], *, num_tokens: int | None = None) -> list[SequenceSpan]:
    """Find the sequences of a batch, in (row, column) order, ordinals counted from 0.

    Real tokens are those with a non-zero ``attention_mask``, or all tokens if there is none. Within the real tokens
    of a row a sequence starts at the first, at each entry of ``cu_seq_lens_q``, and wherever ``position_ids`` returns
    to 0. Read from the collator's tensors on the CPU, this costs no device synchronization.

    Args:
        inputs: A collated batch: ``input_ids`` (B, T) and ``attention_mask`` (B, T), ``position_ids`` (B, T) or
            ``cu_seq_lens_q`` (N + 1,).
        num_tokens: Real tokens of a flattened batch. The rest is padding, which upstream's padding-free
            collator leaves looking like one-token sequences.

    Raises:
        UnknownSequenceBoundaries: If none of the three is present, or the mask is not (B, T).
    """
    ids = inputs["input_ids"]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and mask.shape != ids.shape:
        raise UnknownSequenceBoundaries(
            f"attention_mask: must be (B, T) = {tuple(ids.shape)} like input_ids, got {tuple(mask.shape)}. NEFTune "
            "needs each sequence's own length: collate a 2-D mask, or position_ids that restart at 0."
        )
    # (N + 1,) bounds in one flattened row; a mask, where there is one, says more.
    if mask is None and inputs.get("cu_seq_lens_q") is not None:
        return _from_cumulative(inputs["cu_seq_lens_q"].tolist(), num_tokens)
    if mask is None and positions is None:
        raise UnknownSequenceBoundaries(
            "The batch has neither attention_mask nor position_ids nor cu_seq_lens_q, so the length of each sequence "
            "is unknown and NEFTune's scale alpha / sqrt(L * d) with it. Use a collator that gives one of them "
            "(packing: packing_strategy='bfd'), or set neftune_noise_alpha=None."
        )
    return _from_rows(ids, mask, positions, num_tokens)


def count_tokens(spans: Sequence[SequenceSpan]) -> int:
    """Count the real tokens of all spans together."""
    return sum(span.length for span in spans)


def _from_cumulative(bounds: list[int], num_tokens: int | None) -> list[SequenceSpan]:
    """Read the spans from ``cu_seq_lens_q``: every row was flattened into row 0."""
    end = bounds[-1] if num_tokens is None else num_tokens
    # bounds are 0, L1, L1 + L2, ...; those from the last real token on enclose padding.
    pairs = [(a, b) for a, b in pairwise(bounds) if a < end]
    return [SequenceSpan(0, slice(a, b), b - a, ordinal) for ordinal, (a, b) in enumerate(pairs)]


def _from_rows(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None, num_tokens: int | None
) -> list[SequenceSpan]:
    spans: list[SequenceSpan] = []
    for row in range(ids.shape[0]):
        real = torch.arange(ids.shape[1]) if mask is None else mask[row].cpu().nonzero().flatten()  # columns
        # A flattened batch is padded at its end only (pad_to_multiple_of).
        if mask is None and num_tokens is not None:
            real = real[:num_tokens]
        for tokens in _split_at_restarts(real, None if positions is None else positions[row].cpu()):
            spans.append(SequenceSpan(row, _as_slice(tokens), len(tokens), len(spans)))
    return spans


def _split_at_restarts(real: Tensor, positions: Tensor | None) -> list[Tensor]:
    if not len(real):
        return []  # a row of padding only
    if positions is None:
        return [real]
    starts = (positions[real] == 0).nonzero().flatten().tolist()
    # The first real token begins a sequence anyway, and must not cut off an empty one before it.
    inner = [start for start in starts if start > 0]
    return list(torch.tensor_split(real, inner))


def _as_slice(tokens: Tensor) -> slice | Tensor:
    """Return columns without holes as a slice: a view instead of a gather, to which noise is added in place."""
    first, last = int(tokens[0]), int(tokens[-1])
    return slice(first, last + 1) if last - first + 1 == len(tokens) else tokens
