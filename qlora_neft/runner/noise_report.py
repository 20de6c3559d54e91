"""The noise that NEFTune adds to each sequence of a recipe's data, beside the noise that upstream's hook would add.

This needs the tokenizer, the data and the model's configuration, but no weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from typing_extensions import TypedDict

from ..adapter.continued import resolved
from ..base.config import check_base_config, load_tokenizer
from ..data.report import sequence_lengths
from ..display.console import quiet_libraries
from ..display.tables import Table
from ..noise.neftune import expected_norm, noise_scale
from ..recipe import Recipe
from .build import data_of, model_path

UPSTREAM_ROWS = 4  # rows padded or packed together in the comparison


class SequenceNoise(TypedDict):
    """Bounds on one noise component of a sequence of ``length`` tokens.

    ``published`` is alpha / sqrt(L * d); ``padded`` and ``packed`` are what transformers' hook would use if the row
    were padded or packed together with its neighbors.
    """

    length: int
    published: float
    padded: float
    packed: float


class NoiseReport(TypedDict):
    """The JSON of the verb ``noise``; ``width`` is d, ``expected_norm`` that of a whole sequence's noise."""

    alpha: float
    distribution: str
    width: int
    expected_norm: float
    sequences: list[SequenceNoise]


def noise_report(recipe: Recipe, rows: int = 8) -> NoiseReport:
    """Return the effective noise of the first sequences of a recipe's data.

    Args:
        recipe: What is learned.
        rows: Number of sequences.

    Raises:
        UserInputError: If model or data cannot be read.
    """
    recipe = resolved(recipe)
    noise = recipe.neftune
    alpha = noise.noise_alpha if noise else 0.0
    distribution = noise.distribution if noise else "uniform"
    with quiet_libraries():
        width = _embedding_width(recipe)
        lengths = _lengths(recipe, rows)
    return {
        "alpha": alpha,
        "distribution": distribution,
        "width": width,
        "expected_norm": expected_norm(alpha, distribution),
        "sequences": compare_scales(lengths, width, alpha),
    }


def compare_scales(lengths: Sequence[int], width: int, alpha: float) -> list[SequenceNoise]:
    """Return bounds on one noise component per sequence: as published, and as transformers' hook computes them.

    The hook divides by the width of the row it sees (``transformers/integrations/neftune.py``): the longest row of a
    padded batch, or everything packed into one row (huggingface/transformers#34659).
    """
    report: list[SequenceNoise] = []
    for start in range(0, len(lengths), UPSTREAM_ROWS):
        batch = lengths[start : start + UPSTREAM_ROWS]
        for length in batch:
            # The published L is the row's own; upstream divides by the width of the tensor the row lies in.
            published = noise_scale(alpha, length, width)
            padded, packed = noise_scale(alpha, max(batch), width), noise_scale(alpha, sum(batch), width)
            report.append({"length": length, "published": published, "padded": padded, "packed": packed})
    return report


def render(report: NoiseReport, console: Console) -> None:
    """Print a report as a table."""
    # Uniform noise has a bound; a normal component has none, so its spread is told instead.
    bound = {"uniform": "largest", "gaussian": "standard deviation of a", "bernoulli": "size of every"}[
        report["distribution"]
    ]
    console.print(
        f"NEFTune alpha {report['alpha']:g}, {report['distribution']}, d = {report['width']}: "
        f"norm {report['expected_norm']:.3f} per sequence, padding gets none"
    )
    columns = (
        "tokens",
        "published",
        f"transformers, padded in {UPSTREAM_ROWS}s",
        f"transformers, packed in {UPSTREAM_ROWS}s",
    )
    rows = [
        (
            str(row["length"]),
            f"{row['published']:.5f}",
            *(f"{row[way]:.5f} ({_share(row[way], row['published'])})" for way in ("padded", "packed")),
        )
        for row in report["sequences"]
    ]
    console.print(Table(columns, rows, f"{bound} noise component per sequence", align="r").rich())
    console.print("Percentages: of the published noise. Every row is one training sequence, in the order of the data.")


def _share(value: float, published: float) -> str:
    return "no noise" if published == 0 else f"{value / published:.0%}"


def _lengths(recipe: Recipe, rows: int) -> list[int]:
    tokenizer = load_tokenizer(model_path(recipe), revision=recipe.model.revision)
    return sequence_lengths(data_of(recipe, tokenizer).train)[:rows].tolist()


def _embedding_width(recipe: Recipe) -> int:
    config = check_base_config(model_path(recipe), revision=recipe.model.revision)
    text = config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", text.hidden_size))  # OPT-350m's embeddings are narrower
