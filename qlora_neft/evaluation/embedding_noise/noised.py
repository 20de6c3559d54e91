"""Sequences of tokens under NEFTune's noise, drawn by the code that training draws it with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...neftune import NEFTuneNoise, NoiseStatistics
from ...steps.sequences import SequenceSpan
from .table import EmbeddingTable


@dataclass(frozen=True)
class NoisedRows:
    """One sequence.

    Attributes:
        rows: Its tokens as rows of the table (L,).
        clean: Embeddings (L, D), float32.
        noise: What is added to them (L, D), float32; valid until the next sequence is asked for.
    """

    rows: Tensor
    clean: Tensor
    noise: Tensor


def noised(
    table: EmbeddingTable,
    sequences: Sequence[Tensor],
    alpha: float,
    *,
    seed: int = 0,
    distribution: str = "uniform",
    statistics: NoiseStatistics | None = None,
) -> Iterator[NoisedRows]:
    """Each sequence with the noise it would get in the first optimizer step of a run.

    Args:
        table: The embedding.
        sequences: Token ids (L,) each; its place is the sequence's ordinal in the step.
        alpha: Noise strength, >= 0.
        seed: Of the run.
        distribution: ``uniform`` or ``gaussian``.
        statistics: Where to record norms.
    """
    for ordinal, ids in enumerate(sequences):
        rows = table.row_of_token[ids.to(table.row_of_token.device)]
        clean = table.of_rows(rows)
        spans = [SequenceSpan(0, slice(0, len(ids)), len(ids), ordinal)]
        hook = NEFTuneNoise(spans, alpha, seed, 0, distribution, statistics=statistics)
        for _, noise in hook.drawn(clean[None]):
            yield NoisedRows(rows, clean, noise)


def whole_vocabulary(table: EmbeddingTable, length: int) -> list[Tensor]:
    """Every token once, in the order of ids, in sequences of ``length``; the last goes on from the first token."""
    count = -(-table.vocabulary // length) * length
    return list((torch.arange(count) % table.vocabulary).split(length))
