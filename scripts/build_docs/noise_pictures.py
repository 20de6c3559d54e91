"""The pictures of the page on noise, drawn with the functions that training uses. Needs matplotlib and torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from qlora_neft.noise.neftune import NEFTuneNoise, expected_norm, noise_scale
from qlora_neft.runner.noise_report import compare_scales
from qlora_neft.steps.sequences import SequenceSpan

ALPHA, WIDTH = 5.0, 4096  # of Llama 7B
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
BATCH = (38, 61, 120, 96, 44, 205, 77, 512, 51, 330, 47, 58, 900, 72, 66, 110)  # tokens; padded in fours as they come
OURS, THEIRS, GREY = "#00897b", "#e4572e", "#808890"  # readable on white and on black


def draw_all(folder: Path) -> None:
    """Write every picture."""
    folder.mkdir(exist_ok=True)
    for name, draw in {"noise_length": _by_length, "noise_batch": _by_batch, "noise_norm": _norms}.items():
        _draw(folder / f"{name}.svg", draw)


def _draw(path: Path, fill: Callable[[Any], None]) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    colors = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY)
    with mpl.rc_context({**colors, "svg.hashsalt": path.stem, "font.size": 11, "svg.fonttype": "path"}):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        fill(axes)
        axes.legend(frameon=False)
        figure.savefig(path, transparent=True, metadata={"Date": None})


def _by_length(axes: Any) -> None:
    """Draw the largest noise on one component against the sequence's own length, and under padding to 512."""
    own = [noise_scale(ALPHA, length, WIDTH) for length in LENGTHS]
    padded = [noise_scale(ALPHA, max(length, 512), WIDTH) for length in LENGTHS]
    axes.plot(LENGTHS, own, "o-", color=OURS, label="as published: L is the sequence's own length")
    axes.plot(LENGTHS, padded, "s--", color=THEIRS, label="transformers: beside a row of 512 tokens")
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.set(xlabel="tokens of the sequence", ylabel="noise on one component, at most", ylim=(0, None))


def _by_batch(axes: Any) -> None:
    """Draw the noise of sixteen sequences, each by its own length and padded in fours."""
    rows = compare_scales(list(BATCH), WIDTH, ALPHA)
    places = range(len(rows))
    axes.bar([x - 0.2 for x in places], [row["published"] for row in rows], 0.4, color=OURS, label="as published")
    axes.bar([x + 0.2 for x in places], [row["padded"] for row in rows], 0.4, color=THEIRS, label="transformers, fours")
    axes.set_xticks(list(places), [str(length) for length in BATCH], fontsize=8.5)
    axes.set(xlabel="tokens of each sequence, in the order of the batch", ylabel="noise on one component, at most")


def _norms(axes: Any) -> None:
    """Draw the L2 norm of noise drawn by the code against length, on which it does not depend."""
    for distribution, color in (("uniform", OURS), ("gaussian", THEIRS)):
        norms = [norm for length in LENGTHS for norm in _drawn_norms(length, distribution)]
        at = [length for length in LENGTHS for _ in range(8)]
        axes.plot(at, norms, "o", color=color, alpha=0.6, label=f"{distribution}: drawn by the code, 8 sequences each")
        axes.axhline(expected_norm(ALPHA, distribution), color=color, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.set(xlabel="tokens of the sequence", ylabel="L2 norm of its noise, alpha 5", ylim=(0, 7))


def _drawn_norms(length: int, distribution: str) -> Iterable[float]:
    """Return the norms of the noise of eight sequences, as `NEFTuneNoise` adds it."""
    width = 64  # the norm does not depend on it either
    spans = [SequenceSpan(row, slice(0, length), length, row) for row in range(8)]
    noise = NEFTuneNoise(spans, ALPHA, seed=0, step=0, distribution=distribution)
    for _, drawn in noise.drawn(torch.zeros(8, length, width)):
        yield drawn.norm().item()
