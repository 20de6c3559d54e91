"""AlpacaEval's win rate from a judge's preferences. No torch, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import UserInputError

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
        standard_error: Of ``win_rate``, in percent; None for a single preference.
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def win_rate(preferences: Sequence[float | None]) -> WinRate:
    """The official formula of the alpaca_eval package (``metrics/helpers.py``, ``describe_head2head``).

    Args:
        preferences: 1 if the reference is preferred, 2 if the model, 1.5 or 0 for a tie, or anything between 1 and 2
            from a judge that gives probabilities. None, NaN and what lies outside are no preferences and left out.

    Raises:
        UserInputError: If none is usable.
    """
    scores = [score for score in map(_score, preferences) if score is not None]
    if not scores:
        raise UserInputError(
            f"the annotations have no usable preference among {len(preferences)}: it must be between 1 (the reference "
            "is better) and 2 (the model is better)."
        )
    n, mean = len(scores), math.fsum(scores) / len(scores)
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
    """Mean characters, cut to a whole number as on the leaderboards (``alpaca_eval/main.py``)."""
    return int(sum(map(len, texts)) / len(texts))


def _score(preference: float | None) -> float | None:
    """1 for the model, 0 for the reference; None for what is no preference."""
    if preference is None:
        return None
    if preference == OLD_TIE:
        preference = TIE
    return preference - 1 if 1 <= preference <= 2 else None


def score_lines(found: dict[str, Any]) -> list[str]:
    """The lines of a score, from `alpaca_format.score`."""
    error, without = found["standard_error"], found["wins_without_draws"]
    spread = "" if error is None else f" ± {error:.2f} (standard error)"
    return [
        f"win rate                 {found['win_rate']:.2f}%{spread}",
        f"wins, losses, ties       {found['wins']}, {found['losses']}, {found['ties']} of {found['n']}",
        "wins without draws       " + ("-" if without is None else f"{without:.2f}%"),
        f"average length           {found['avg_length']} characters",
        found["length_controlled"],
    ]


def notes(found: dict[str, Any]) -> list[str]:
    """What a reader of the score must know."""
    lines = []
    if found["excluded"]:
        lines.append(f"{found['excluded']} annotations without a preference are left out")
    if found["not_annotated"]:
        lines.append(f"{found['not_annotated']} outputs are not the ones that were annotated; avg_length counts them")
    return lines
