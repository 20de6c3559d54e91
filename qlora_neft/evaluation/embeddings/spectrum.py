"""Top singular values of the embedding similarity matrix, without the matrix.

Jain et al. 2023, NEFTune, appendix "Impact of noise on embedding similarity", arXiv:2310.05914. The paper does not say
which similarity it means; here are the two usual ones. S = E E^T (V, V) holds inner products of all pairs of token
embeddings, or their cosines if the rows of E have norm 1. S is symmetric and positive semidefinite, so its singular
values are its eigenvalues, and those that are not zero are the eigenvalues of E^T E (D, D), a sum over blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .flips import NoisedRows
from .table import ROWS_AT_ONCE, EmbeddingTable

TOP = 100


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a similarity matrix in descending order; at most `TOP`.

    Attributes:
        inner_product: Of S = E E^T.
        cosine: Of S with each row of E divided by its norm (a row of zeros stays one). All of them sum to V.
    """

    inner_product: list[float]
    cosine: list[float]


def similarity_spectrum(blocks: Iterable[Tensor], width: int, top: int = TOP) -> Spectrum:
    """Compute the singular values of the similarity matrix of all rows in some blocks.

    Args:
        blocks: (N, D) each, float32. Products are in float32, their sums and the eigenvalues in float64.
        width: D.
        top: How many to return.
    """
    grams: list[Tensor] | None = None
    count = 0
    for block in blocks:
        count += len(block)
        # (D, D) instead of (V, V); float64, as rounding adds up over the blocks of a whole vocabulary.
        grams = grams or [torch.zeros(width, width, dtype=torch.float64, device=block.device) for _ in range(2)]
        for gram, rows in zip(grams, (block, torch.nn.functional.normalize(block, dim=1)), strict=True):
            gram += rows.T @ rows
    top = min(top, count, width)  # no more than the rank of E
    values = []
    # Ascending from eigvalsh; rounding can make the smallest ones negative, which S has none of.
    while grams:  # the first is freed before the second is decomposed
        values.append(torch.linalg.eigvalsh(grams.pop(0)).flip(0)[:top].clamp(min=0).tolist())
    return Spectrum(*values)


def clean_blocks(table: EmbeddingTable) -> Iterator[Tensor]:
    """Yield the embeddings of all tokens, in blocks."""
    for rows in table.row_of_token.split(ROWS_AT_ONCE):
        yield table.of_rows(rows)


def noised_blocks(table: EmbeddingTable, sequences: Iterable[NoisedRows]) -> Iterator[Tensor]:
    """Yield the noised embeddings of all tokens, in blocks, from `whole_vocabulary` under noise."""
    waiting: list[Tensor] = []
    left = table.vocabulary
    for one in sequences:
        waiting.append((one.clean + one.noise)[:left])  # the last sequence is filled up with tokens that came before
        left -= len(waiting[-1])
        if sum(map(len, waiting)) >= ROWS_AT_ONCE or left == 0:
            yield torch.cat(waiting)
            waiting = []
        if left == 0:
            return
