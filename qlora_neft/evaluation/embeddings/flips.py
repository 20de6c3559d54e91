"""Token flips: noised embeddings that lie nearer to another token's embedding than to their own.

Jain et al. 2023, NEFTune, appendix, arXiv:2310.05914: each noised embedding is projected back to its closest neighbor
in the embedding matrix. Closest is by Euclidean distance.

Not every embedding has to be compared with every other. With u the unit vector to another embedding at distance r,
noise n flips the token only if n.u > r / 2. So a token cannot flip if its nearest neighbor is farther than 2 |n|. Nor
can it, except with a probability of `CHANCE` in the whole measurement, if its nearest neighbor is farther than
sigma sqrt(8 ln(pairs / CHANCE)): components of standard deviation sigma, uniform or normal, are sub-Gaussian,
P(n.u > t) <= exp(-t^2 / (2 sigma^2)).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...noise.neftune import UNIT_RMS, NEFTuneNoise, NoiseStatistics, noise_scale
from ...steps.sequences import SequenceSpan
from .table import POINTS_AT_ONCE, EmbeddingTable

CHANCE = 1e-9  # that any flip of a measurement is missed


@dataclass
class Flips:
    """The tokens that noise of one strength flips.

    Attributes:
        alpha: Noise strength.
        flipped: Flipped tokens of each sequence.
        lengths: Counted tokens of each sequence.
        searched: Tokens that had to be compared with the whole embedding.
        noise_to_embedding: Ratio of the norms of noise and embeddings, averaged over sequences.
        pairs: (token, nearest token) of the flips, and how often each occurred.
    """

    alpha: float
    flipped: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    searched: int = 0
    noise_to_embedding: float = 0.0
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of all tokens that flipped, in [0, 1]."""
        return sum(self.flipped) / sum(self.lengths)

    @property
    def share_per_sequence(self) -> float:
        """Each sequence's share averaged over sequences, in [0, 1]: what the paper reports for real data."""
        shares = [flipped / length for flipped, length in zip(self.flipped, self.lengths, strict=True)]
        return sum(shares) / len(shares)


@dataclass(frozen=True)
class NoisedRows:
    """One sequence under noise.

    Attributes:
        rows: Its tokens as rows of the table, (L,).
        clean: Embeddings, (L, D), float32.
        noise: Noise added to them, (L, D), float32; valid until the next sequence is asked for.
    """

    rows: Tensor
    clean: Tensor
    noise: Tensor


def token_flips(
    table: EmbeddingTable,
    sequences: Sequence[Tensor],
    alphas: Sequence[float],
    *,
    seed: int = 0,
    distribution: str = "uniform",
    max_tokens: int | None = None,
    gaps: Tensor | None = None,
) -> list[Flips]:
    """Count the tokens that flip, for each noise strength.

    Args:
        table: The embedding.
        sequences: Token ids (L,) each, L >= 1. They are the sequences of one optimizer step.
        alphas: Noise strengths, each >= 0.
        seed: Seed of the noise.
        distribution: ``uniform``, ``gaussian`` or ``bernoulli``.
        max_tokens: Count only the first N tokens; the others only fill the last sequence.
        gaps: From `gaps_of`, to share among several calls with one table.
    """
    gaps = gaps_of(table, sequences) if gaps is None else gaps
    return [_flips(table, sequences, alpha, seed, distribution, max_tokens, gaps) for alpha in alphas]


def gaps_of(table: EmbeddingTable, sequences: Sequence[Tensor]) -> Tensor:
    """Return a lower bound (R,) on each row's distance to its nearest neighbor; infinite for rows that do not occur."""
    # Only rows that occur: a search for all of them costs R^2 D, the whole vocabulary's.
    used = table.row_of_token[torch.cat(list(sequences)).to(table.row_of_token.device)].unique()
    gaps = torch.full((len(table.rows),), torch.inf, device=used.device)
    gaps[used] = table.gaps(used)
    return gaps


def noised(
    table: EmbeddingTable,
    sequences: Sequence[Tensor],
    alpha: float,
    *,
    seed: int = 0,
    distribution: str = "uniform",
    statistics: NoiseStatistics | None = None,
) -> Iterator[NoisedRows]:
    """Yield each sequence with the noise it would get in the first optimizer step of a run.

    Args:
        table: The embedding.
        sequences: Token ids (L,) each; a sequence's place is its ordinal in the step.
        alpha: Noise strength, >= 0.
        seed: The run's seed.
        distribution: ``uniform``, ``gaussian`` or ``bernoulli``.
        statistics: Where to record norms.
    """
    for ordinal, ids in enumerate(sequences):
        rows = table.row_of_token[ids.to(table.row_of_token.device)]
        clean = table.of_rows(rows)
        # The hook of training itself draws the noise, here for a batch of one: (1, L, D).
        spans = [SequenceSpan(0, slice(0, len(ids)), len(ids), ordinal)]
        hook = NEFTuneNoise(spans, alpha, seed, 0, distribution, statistics=statistics)
        for _, noise in hook.drawn(clean[None]):
            yield NoisedRows(rows, clean, noise)


def whole_vocabulary(table: EmbeddingTable, length: int) -> list[Tensor]:
    """Return every token once, in the order of ids, in sequences of ``length``; the last is filled up from token 0."""
    count = -(-table.vocabulary // length) * length  # rounded up: every sequence has L tokens, so one noise scale
    return list((torch.arange(count) % table.vocabulary).split(length))


def _flips(
    table: EmbeddingTable,
    sequences: Sequence[Tensor],
    alpha: float,
    seed: int,
    distribution: str,
    max_tokens: int | None,
    gaps: Tensor,
) -> Flips:
    found, statistics = Flips(alpha), NoiseStatistics()
    # A union bound: no pair of a token and another row may be missed with more than CHANCE / pairs.
    pairs = max(sum(map(len, sequences)) * len(table.rows), 1)
    reach = math.sqrt(8 * math.log(pairs / CHANCE)) * UNIT_RMS[distribution]  # in units of the noise's scale
    left = math.inf if max_tokens is None else max_tokens
    search = _Search(table, found)
    for one in noised(table, sequences, alpha, seed=seed, distribution=distribution, statistics=statistics):
        length = int(min(len(one.rows), left))
        left -= length
        if length == 0:
            continue
        found.lengths.append(length)
        found.flipped.append(0)
        near = _may_flip(one, gaps, reach * noise_scale(alpha, len(one.rows), table.width))
        search.add(one, near[:length].nonzero().flatten())
    search.finish()
    found.noise_to_embedding = (statistics.means() or (0.0, 0.0))[1]
    return found


def _may_flip(one: NoisedRows, gaps: Tensor, reach: float) -> Tensor:
    # Two bounds, the tighter of both: 2 |n| is certain, the reach holds up to CHANCE; see the module's docstring.
    norms = torch.linalg.vector_norm(one.noise, dim=1)  # (L,)
    return gaps[one.rows] < (2 * norms).clamp(max=reach)


class _Search:
    """Collects noised embeddings of many sequences and compares them with the table, a block at a time."""

    def __init__(self, table: EmbeddingTable, found: Flips) -> None:
        self._table, self._found = table, found
        self._points: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._sequences: list[int] = []

    def add(self, one: NoisedRows, which: Tensor) -> None:
        """Take some of a sequence's tokens; the sequence is the last one that was counted."""
        for part in which.split(POINTS_AT_ONCE):
            self._points.append(one.clean[part] + one.noise[part])  # copied: the noise is valid for this sequence only
            self._rows.append(one.rows[part])
            self._sequences += [len(self._found.lengths) - 1] * len(part)
            if len(self._sequences) >= POINTS_AT_ONCE:
                self.finish()

    def finish(self) -> None:
        """Compare what is collected."""
        if not self._sequences:
            return
        points, own = torch.cat(self._points), torch.cat(self._rows)  # (N, D), (N,)
        other, _ = self._table.nearest_other(points, own)
        # The search multiplies in float32 and rounds; which of the two is nearer is decided in float64.
        flipped = _squared_distance(self._table, points, other) < _squared_distance(self._table, points, own)
        which = flipped.nonzero().flatten()
        for i in which.tolist():
            self._found.flipped[self._sequences[i]] += 1
        # Tokens that share a row go by the smallest id.
        tokens = (self._table.first_token[rows[which].cpu()].tolist() for rows in (own, other))
        self._found.pairs.update(zip(*tokens, strict=True))
        self._found.searched += len(own)
        self._points, self._rows, self._sequences = [], [], []


def _squared_distance(table: EmbeddingTable, points: Tensor, rows: Tensor) -> Tensor:
    # The difference itself, not |x|^2 - 2 x.e + |e|^2, which cancels when the two are close.
    return (points.double() - table.of_rows(rows).double()).square().sum(dim=1)
