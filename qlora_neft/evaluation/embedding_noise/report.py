"""Token flips and singular values of one embedding as plain values, for JSON, a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .flips import Flips, gaps_of, token_flips
from .noised import noised, whole_vocabulary
from .spectrum import Spectrum, clean_blocks, noised_blocks, similarity_spectrum
from .table import EmbeddingTable

PAIRS_SHOWN = 20


def embedding_noise_report(
    table: EmbeddingTable,
    sequences: Sequence[Tensor],
    *,
    alphas: Sequence[float],
    lengths: Sequence[int],
    seed: int = 0,
    distribution: str = "uniform",
    spell: Callable[[int], str] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure an embedding under noise.

    Args:
        table: The embedding.
        sequences: Token ids (L,) of real data; each gets the noise of its own length. May be empty.
        alphas: Noise strengths.
        lengths: L for noise on the whole vocabulary; may be empty if there are sequences.
        seed: Of the noise.
        distribution: ``uniform`` or ``gaussian``.
        spell: Text of a token id, to name tokens that flip.
        say: Told what is being done.

    Returns:
        ``vocabulary``, ``distinct_embeddings``, ``width``; ``flips``, a list of entries with ``over`` (``data`` or
        ``vocabulary``), ``alpha``, ``length`` (of data: the median), ``tokens``, ``flipped``, ``share``,
        ``share_per_sequence``, ``noise_to_embedding``, ``pairs``; ``singular_values``, a list of entries with ``alpha``
        (0: clean), ``length`` (null: clean), ``inner_product`` and ``cosine``.
    """
    say = say or (lambda text: None)
    common = {"seed": seed, "distribution": distribution}
    flips: list[dict[str, Any]] = []
    everything = [torch.arange(table.vocabulary)] if lengths else list(sequences)
    say(f"nearest neighbours among {len(table.rows):,} embeddings of width {table.width:,}")
    gaps = gaps_of(table, everything)
    middle = int(statistics.median(map(len, sequences))) if sequences else None
    if sequences:
        say(f"token flips in {len(sequences):,} sequences")
        found = token_flips(table, sequences, alphas, gaps=gaps, **common)
        flips += [_entry("data", one, middle, spell) for one in found]
    for length in lengths:
        say(f"token flips over the whole vocabulary, L = {length}")
        tokens = whole_vocabulary(table, length)
        found = token_flips(table, tokens, alphas, gaps=gaps, max_tokens=table.vocabulary, **common)
        flips += [_entry("vocabulary", one, length, spell) for one in found]
    return {
        "vocabulary": table.vocabulary,
        "distinct_embeddings": len(table.rows),
        "width": table.width,
        **common,
        "sequences": len(sequences),
        "flips": flips,
        "singular_values": _spectra(table, alphas, min(lengths) if lengths else middle, say, **common),
    }


def _entry(over: str, found: Flips, length: int | None, spell: Callable[[int], str] | None) -> dict[str, Any]:
    spelled = spell or str
    return {
        "over": over,
        "alpha": found.alpha,
        "length": length,
        "tokens": sum(found.lengths),
        "flipped": sum(found.flipped),
        "share": found.share,
        "share_per_sequence": found.share_per_sequence,
        "sequences_with_flips": sum(count > 0 for count in found.flipped),
        "noise_to_embedding": found.noise_to_embedding,
        "searched": found.searched,
        "pairs": [
            {"token": a, "nearest": b, "text": [spelled(a), spelled(b)], "count": count}
            for (a, b), count in found.pairs.most_common(PAIRS_SHOWN)
        ],
    }


def _spectra(
    table: EmbeddingTable,
    alphas: Sequence[float],
    length: int,
    say: Callable[[str], None],
    **common: Any,
) -> list[dict[str, Any]]:
    say("singular values of the similarity matrix, without noise")
    found = [_values(0.0, None, similarity_spectrum(clean_blocks(table), table.width))]
    tokens = whole_vocabulary(table, length)
    for alpha in alphas:
        if alpha > 0:
            say(f"singular values of the similarity matrix, alpha {alpha:g}, L = {length}")
            blocks = noised_blocks(table, noised(table, tokens, alpha, **common))
            found.append(_values(alpha, length, similarity_spectrum(blocks, table.width)))
    return found


def _values(alpha: float, length: int | None, spectrum: Spectrum) -> dict[str, Any]:
    return {
        "alpha": alpha,
        "length": length,
        "inner_product": spectrum.inner_product,
        "cosine": spectrum.cosine,
    }
