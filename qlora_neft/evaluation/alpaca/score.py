"""The verb ``eval alpaca score``: AlpacaEval's win rate from a judge's verdicts. No torch, no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserInputError
from .files import Annotation, Output, read_annotations, read_outputs

TIE, OLD_TIE = 1.5, 0  # AlpacaEval's first annotations have 0 for a tie
LENGTH_CONTROLLED_NOTE = (
    "The length-controlled win rate is not computed here: it is a regression over all models of a leaderboard, whose "
    "data and fitted difficulties come with the alpaca_eval package. With it: "
    "alpaca_eval --model_outputs OUTPUTS.json --annotators_config weighted_alpaca_eval_gpt4_turbo"
)


@dataclass(frozen=True)
class WinRate:
    """How often the second output of each pair is preferred to the first, the reference.

    Attributes:
        win_rate: Percent; a tie counts half.
        standard_error: Standard error of ``win_rate``, in percent; None for a single preference.
        n: Preferences counted.
        wins, losses, ties: Preferences above, below and at one half.
        excluded: Pairs without a usable preference, not in ``n``.
        wins_without_draws: ``wins / (n - ties)`` in percent, the formula of NEFTune's human study (88 of 140 with 22
            draws are 74.6%); None if all are ties.
    """

    win_rate: float
    standard_error: float | None
    n: int
    wins: int
    losses: int
    ties: int
    excluded: int
    wins_without_draws: float | None


@dataclass(frozen=True)
class Score:
    """Win rate and length of a model's outputs.

    Attributes:
        rate: The win rate.
        avg_length: Mean characters of the outputs, cut to a whole number.
        not_annotated: Outputs that no annotation is about.
        annotations: File of the annotations; None if the user named it.
        made: Who judged against whom, and how the answers were made; empty if only a file of annotations is known.
        length_controlled: The package's length-controlled win rate in percent, None where it gave none.
    """

    rate: WinRate
    avg_length: int
    not_annotated: int
    annotations: Path | None = None
    made: Mapping[str, Any] = field(default_factory=dict)
    length_controlled: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, under the names of AlpacaEval's leaderboards."""
        found = {
            **asdict(self.rate),
            "avg_length": self.avg_length,
            "not_annotated": self.not_annotated,
            "length_controlled": LENGTH_CONTROLLED_NOTE if self.length_controlled is None else self.length_controlled,
        }
        found |= {"made": dict(self.made)} if self.made else {}
        return found if self.annotations is None else {**found, "annotations": str(self.annotations)}

    def measures(self) -> dict[str, float | None]:
        """Return what a run keeps of it in ``measures.json``."""
        return {
            "alpaca_win_rate": self.rate.win_rate,
            "alpaca_standard_error": self.rate.standard_error,
            "alpaca_avg_length": self.avg_length,
            "alpaca_length_controlled_win_rate": self.length_controlled,
        }

    def lines(self) -> list[str]:
        """Return the score as lines to print."""
        rate = self.rate
        spread = "" if rate.standard_error is None else f" ± {rate.standard_error:.2f} (standard error)"
        without = "-" if rate.wins_without_draws is None else f"{rate.wins_without_draws:.2f}%"
        controlled = (
            LENGTH_CONTROLLED_NOTE
            if self.length_controlled is None
            else f"length-controlled        {self.length_controlled:.2f}%"
        )
        by = [f"judge, reference         {self.made['judge']}, {self.made['reference']}"] if self.made else []
        return [
            *by,
            f"win rate                 {rate.win_rate:.2f}%{spread}",
            f"wins, losses, ties       {rate.wins}, {rate.losses}, {rate.ties} of {rate.n}",
            f"wins without draws       {without}",
            f"average length           {self.avg_length} characters",
            controlled,
        ]

    def notes(self) -> list[str]:
        """Return what a reader of the score should know about the rows behind it."""
        lines = []
        if self.rate.excluded:
            lines.append(f"{self.rate.excluded} annotations without a preference are left out")
        if self.not_annotated:
            lines.append(f"{self.not_annotated} outputs are not the ones that were annotated; avg_length counts them")
        return lines


def score_files(annotations: Path, outputs: Path | None = None, key: str = "--score") -> Score:
    """Score a file of annotations.

    Args:
        annotations: The judge's, in AlpacaEval's format.
        outputs: File of the outputs whose lengths count; by default those that were annotated.
        key: What the caller wrote for ``annotations``, for messages.

    Raises:
        UserInputError: If a file cannot be used, or none of the outputs was annotated.
    """
    return score(read_annotations(annotations, key), None if outputs is None else read_outputs(outputs))


def score(annotations: Sequence[Annotation], outputs: Sequence[Output] | None = None) -> Score:
    """Compute win rate and length.

    Args:
        annotations: From `read_annotations`.
        outputs: The outputs whose lengths count; by default those that were annotated.

    Raises:
        UserInputError: If none of the outputs was annotated, or no preference is usable.
    """
    texts = [row["output_2"] for row in annotations] if outputs is None else [row["output"] for row in outputs]
    # By output as well: annotations of earlier answers to the same instructions do not count for these.
    judged = {(row["instruction"], row["output_2"]) for row in annotations}
    others = sum((row["instruction"], row["output"]) not in judged for row in outputs or ())
    if outputs is not None and others == len(outputs):
        raise UserInputError("--outputs: none of these outputs is in the annotations. Give the file that was judged.")
    return Score(win_rate([row["preference"] for row in annotations]), average_length(texts), others)


def win_rate(preferences: Sequence[float | None]) -> WinRate:
    """Apply the official formula of the alpaca_eval package (``metrics/helpers.py``, ``describe_head2head``).

    Args:
        preferences: 1 if the reference is preferred, 2 if the model, 1.5 or 0 for a tie, or anything between 1 and 2
            from a judge that gives probabilities. None, NaN and values outside are not preferences and are left out.

    Raises:
        UserInputError: If none is usable.
    """
    scores = [score for score in map(_score, preferences) if score is not None]
    if not scores:
        raise UserInputError(
            f"the annotations have no usable preference among {len(preferences)}: it must be between 1 (the reference "
            "is better) and 2 (the model is better)."
        )
    # fsum: exact, so that the order of the annotations does not matter.
    n, mean = len(scores), math.fsum(scores) / len(scores)
    # Over n - 1, as pandas' sem, which the package uses.
    variance = math.fsum((score - mean) ** 2 for score in scores) / (n - 1) if n > 1 else None
    wins, ties = sum(score > 0.5 for score in scores), sum(score == 0.5 for score in scores)
    return WinRate(
        win_rate=100 * mean,
        standard_error=None if variance is None else math.sqrt(variance) / math.sqrt(n) * 100,
        n=n,
        wins=wins,
        losses=n - wins - ties,
        ties=ties,
        excluded=len(preferences) - n,
        wins_without_draws=100 * wins / (n - ties) if n > ties else None,
    )


def average_length(texts: Sequence[str]) -> int:
    """Return the mean characters, cut to a whole number as on the leaderboards (``alpaca_eval/main.py``)."""
    return int(sum(map(len, texts)) / len(texts))


def _score(preference: float | None) -> float | None:
    """Map a preference to 1 for the model, 0 for the reference; None if it is not usable."""
    if preference is None:
        return None
    if preference == OLD_TIE:
        preference = TIE
    # NaN fails both comparisons.
    return preference - 1 if 1 <= preference <= 2 else None
