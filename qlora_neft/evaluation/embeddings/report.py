"""Token flips and singular values of one embedding: as plain values, as text and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import TypedDict

from ...display.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, new_picture, save_picture
from ...display.tables import Table
from .flips import Flips, gaps_of, noised, token_flips, whole_vocabulary
from .spectrum import Spectrum, clean_blocks, noised_blocks, similarity_spectrum
from .table import EmbeddingTable

PAIRS_SHOWN, PAIRS_NAMED = 20, 5  # pairs of flipped tokens in the report, and in its text
RANKS = (1, 2, 10, 20, 50, 100)  # singular values in the text
COLORS = (BLUE, ORANGE, VERMILION, PURPLE, GREEN, SKY)


class FlippedPair(TypedDict):
    """A token, the one its noised embedding is nearest to, both as text, and how often that occurred."""

    token: int
    nearest: int
    text: list[str]
    count: int


class FlipsEntry(TypedDict):
    """Flips under noise of one strength; ``length`` is L, for data the median. See `Flips` for the rest."""

    over: Literal["data", "vocabulary"]
    alpha: float
    length: int
    tokens: int
    flipped: int
    share: float
    share_per_sequence: float
    sequences_with_flips: int
    noise_to_embedding: float
    searched: int
    pairs: list[FlippedPair]


class SpectrumEntry(TypedDict):
    """Singular values under noise of one strength; without noise ``alpha`` is 0 and ``length`` null."""

    alpha: float
    length: int | None
    inner_product: list[float]
    cosine: list[float]


class EmbeddingNoise(TypedDict):
    """Flips and singular values of one embedding; ``sequences`` counts those of the data."""

    vocabulary: int
    distinct_embeddings: int
    width: int
    seed: int
    distribution: str
    sequences: int
    flips: list[FlipsEntry]
    singular_values: list[SpectrumEntry]


class EmbeddingNoiseReport(EmbeddingNoise):
    """The JSON of ``eval flips``."""

    model: str


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
) -> EmbeddingNoise:
    """Measure an embedding under noise.

    Args:
        table: The embedding.
        sequences: Token ids (L,) of real data; each gets the noise of its own length. May be empty.
        alphas: Noise strengths.
        lengths: Values of L for noise on the whole vocabulary; may be empty if there are sequences.
        seed: Seed of the noise.
        distribution: ``uniform``, ``gaussian`` or ``bernoulli``.
        spell: Gives a token id's text, to name the tokens that flip.
        say: Called with what is being done.
    """
    say = say or (lambda text: None)
    flips: list[FlipsEntry] = []
    # Gaps do not depend on the noise: searched once, for the whole vocabulary if it is measured anyway.
    everything = [torch.arange(table.vocabulary)] if lengths else list(sequences)
    say(f"nearest neighbours among {len(table.rows):,} embeddings of width {table.width:,}")
    gaps = gaps_of(table, everything)
    middle = int(statistics.median(map(len, sequences))) if sequences else None
    if middle is not None:
        say(f"token flips in {len(sequences):,} sequences")
        found = token_flips(table, sequences, alphas, seed=seed, distribution=distribution, gaps=gaps)
        flips += [_entry("data", one, middle, spell) for one in found]
    for length in lengths:
        say(f"token flips over the whole vocabulary, L = {length}")
        common: dict[str, Any] = {"seed": seed, "distribution": distribution, "gaps": gaps}
        found = token_flips(table, whole_vocabulary(table, length), alphas, max_tokens=table.vocabulary, **common)
        flips += [_entry("vocabulary", one, length, spell) for one in found]
    # The spectrum is shown where noise is largest, at the shortest L.
    length = min(lengths) if lengths else middle
    assert length is not None  # there are lengths or sequences
    return {
        "vocabulary": table.vocabulary,
        "distinct_embeddings": len(table.rows),
        "width": table.width,
        "seed": seed,
        "distribution": distribution,
        "sequences": len(sequences),
        "flips": flips,
        "singular_values": _spectra(table, alphas, length, say, seed=seed, distribution=distribution),
    }


def _entry(
    over: Literal["data", "vocabulary"], found: Flips, length: int, spell: Callable[[int], str] | None
) -> FlipsEntry:
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
    *,
    seed: int,
    distribution: str,
) -> list[SpectrumEntry]:
    say("singular values of the similarity matrix, without noise")
    found = [_values(0.0, None, similarity_spectrum(clean_blocks(table), table.width))]
    tokens = whole_vocabulary(table, length)
    for alpha in alphas:
        if alpha > 0:  # alpha 0 is the clean one above
            say(f"singular values of the similarity matrix, alpha {alpha:g}, L = {length}")
            blocks = noised_blocks(table, noised(table, tokens, alpha, seed=seed, distribution=distribution))
            found.append(_values(alpha, length, similarity_spectrum(blocks, table.width)))
    return found


def _values(alpha: float, length: int | None, spectrum: Spectrum) -> SpectrumEntry:
    return {
        "alpha": alpha,
        "length": length,
        "inner_product": spectrum.inner_product,
        "cosine": spectrum.cosine,
    }


# ---- Text ----


def lines(report: EmbeddingNoise) -> str:
    """Return a report as text."""
    shared = report["vocabulary"] - report["distinct_embeddings"]
    found = [f"embedding of {report['vocabulary']:,} tokens, width {report['width']:,}"]
    if report["sequences"]:
        found.append(f"data: {report['sequences']:,} rows, each with its own L")
    if shared:
        found.append(f"{shared:,} tokens have the same embedding as another token; that does not count as a flip")
    found += ["", "tokens whose noised embedding is nearer to another token", _flips(report)]
    for kind, name in (("inner_product", "inner products"), ("cosine", "cosines")):
        found += ["", f"singular values of the embedding similarity matrix, {name}", _spectrum(report, kind)]
    worst = max(report["flips"], key=lambda entry: entry["share"])
    if worst["pairs"]:
        named = ", ".join(f"{a!r} to {b!r}" for a, b in (pair["text"] for pair in worst["pairs"][:PAIRS_NAMED]))
        found += ["", f"flipped most often at alpha {worst['alpha']:g}: {named}"]
    return "\n".join(found)


def _flips(report: EmbeddingNoise) -> str:
    rows = []
    for entry in report["flips"]:
        is_data = entry["over"] == "data"
        rows.append(
            [
                entry["over"],
                f"median {entry['length']}" if is_data else str(entry["length"]),
                f"{entry['alpha']:g}",
                f"{entry['tokens']:,}",
                f"{entry['flipped']:,}",
                _percent(entry["share"]),
                _percent(entry["share_per_sequence"]) if is_data else "",
                f"{entry['noise_to_embedding']:.3f}",
            ]
        )
    return Table(("over", "L", "alpha", "tokens", "flipped", "share", "per row", "noise/embedding"), rows).plain()


def _percent(share: float) -> str:
    return "0" if share == 0 else f"{share:.3%}"


def _spectrum(report: EmbeddingNoise, kind: Literal["inner_product", "cosine"]) -> str:
    spectra = report["singular_values"]
    ranks = [rank for rank in RANKS if rank <= len(spectra[0][kind])]
    rows = [[_label(entry), *(f"{entry[kind][rank - 1]:.4g}" for rank in ranks)] for entry in spectra]
    return Table(("noise", *(f"#{rank}" for rank in ranks)), rows).plain()


def _label(entry: SpectrumEntry) -> str:
    return "none" if entry["length"] is None else f"alpha {entry['alpha']:g}, L {entry['length']}"


# ---- Picture ----


def draw(report: EmbeddingNoise, path: Path, title: str) -> bool:
    """Draw shares of flips against alpha, one line for each L, beside the singular values.

    Returns:
        False if matplotlib is not installed (extra ``plots``); nothing is written then.
    """
    picture = new_picture(title, (10, 5))
    if picture is None:
        return False
    figure, axes = picture
    axes.remove()  # a picture comes with one panel; this one has two
    figure.suptitle(title, parse_math=False)  # a dollar sign in a folder's name is not TeX
    left, right = figure.subplots(1, 2)
    _draw_flips(report, left)
    _draw_spectrum(report, right)
    for part in (left, right):
        part.spines[["top", "right"]].set_visible(False)
        part.grid(alpha=0.25)
        part.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return save_picture(figure, path)


def _draw_flips(report: EmbeddingNoise, axes: Any) -> None:
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for entry in report["flips"]:
        lines.setdefault((entry["over"], entry["length"]), []).append((entry["alpha"], 100 * entry["share"]))
    # One line for each L; the data's own lengths are drawn apart, in black.
    for i, ((over, length), points) in enumerate(lines.items()):
        is_data = over == "data"
        label = f"data, own L (median {length})" if is_data else f"vocabulary, L = {length}"
        style = {"color": "black", "linestyle": "--"} if is_data else {"color": COLORS[i % len(COLORS)]}
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label, **style)
    axes.set(xlabel="alpha", ylabel="tokens flipped (%)")
    axes.set_xticks(sorted({entry["alpha"] for entry in report["flips"]}))
    axes.set_ylim(bottom=0)


def _draw_spectrum(report: EmbeddingNoise, axes: Any) -> None:
    for i, entry in enumerate(report["singular_values"]):
        values = entry["cosine"]
        # i - 1: the first entry is the one without noise.
        color = "black" if entry["length"] is None else COLORS[(i - 1) % len(COLORS)]
        label = "no noise" if entry["length"] is None else _label(entry)
        axes.plot(range(1, len(values) + 1), values, color=color, label=label, linewidth=1.6)
    axes.set_yscale("log")
    axes.set(xlabel="rank", ylabel="singular value of the cosine matrix")
