"""What decides a sweep: the measure, which way it is better, and when an arm is called best. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserInputError
from .alike import kinds_of
from .arms import Arm, compare, is_without_noise, rows_interval
from .results_file import Best
from .statistics import CONFIDENCE, Difference, Interval, leaves_zero_out
from .tables import KNOWN, name_of

HELD_OUT_LOSS, WIN_RATE = "held_out_loss", "alpaca.alpaca_win_rate"
SHORT = {"alpaca": WIN_RATE}  # what a user may write instead
Rule = Literal["measurable", "highest"]


@dataclass(frozen=True)
class Decision:
    """How a sweep decides.

    Attributes:
        by: The deciding measure, as in `RunRecord.values`.
        rule: ``measurable``: the arm is named whose lead over every other can be told from chance, over several seeds;
            ours. ``highest``: the arm with the best number, as NEFTune's authors chose alpha from single runs.
    """

    by: str = HELD_OUT_LOSS
    rule: Rule = "measurable"

    @classmethod
    def of(cls, record: Mapping[str, Any] | None) -> Decision:
        """Read back what `to_dict` wrote; a sweep of an earlier version was decided by held-out loss."""
        return cls(record["by"], record["rule"]) if record and {"by", "rule"} <= record.keys() else cls()

    @property
    def is_on_held_out_rows(self) -> bool:
        """Whether the runs need held-out rows for it."""
        return self.by in (HELD_OUT_LOSS, "lowest_held_out_loss", "exact_match")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``sweep.json``."""
        return {"by": self.by, "rule": self.rule}

    def sentence(self, seeds: int) -> str:
        """Say what will decide, before the first run begins."""
        name = name_of(self.by)
        if self.rule == "highest":
            return f"{name.label}, {name.better} is better: the best number of one run each, as in the paper, untested"
        if seeds < 2:
            return f"{name.label}, {name.better} is better; with one seed no arm can be called best (--seeds 3)"
        return f"{name.label}, {name.better} is better; an arm is best if that is measurable over {seeds} seeds"


BY_HELD_OUT_LOSS = Decision()


def decision_by(word: str) -> str:
    """Return the measure that a user names with ``--rank-by``.

    Raises:
        UserInputError: If it is not known which way it is better.
    """
    key = SHORT.get(word, word)
    if name_of(key).better is None:
        known = [*SHORT, *(k for k, name in KNOWN.items() if name.better and k not in SHORT.values())]
        raise UserInputError(
            f"--rank-by: must be a measure that is better when it is higher or lower ({', '.join(known)}, "
            f"loss.NAME_loss or harness.NAME as `qlora-neft eval` stores them), got {word!r}."
        )
    return key


def best(arms: Sequence[Arm], decision: Decision = BY_HELD_OUT_LOSS) -> Best:
    """Find the arm that leads, and whether its lead can be told from chance.

    Args:
        arms: The arms to compare.
        decision: The measure and the rule.

    Returns:
        ``arm`` (None if none is best), ``leading`` (the arm with the best mean in any case), ``by`` and a ``sentence``.
    """
    name, key = name_of(decision.by), decision.by
    measured = [arm for arm in arms if arm.values(key)]
    if len(measured) < 2:
        return _found(key, None, None, f"{name.label}: measured in fewer than two arms, so nothing is decided")
    kinds = kinds_of(key, [run for arm in arms for run in arm.runs])
    if len(kinds) > 1:
        ways = "; ".join(kind.difference for kind in kinds)
        return _found(key, None, None, f"{name.label}: made in {len(kinds)} ways ({ways}), so no arm is best by it")
    sign = 1 if name.better == "lower" else -1
    # Chosen by the mean over all its seeds, then compared over shared ones.
    leading = min(measured, key=lambda arm: sign * _mean(list(arm.values(key).values())))
    others = [arm for arm in measured if arm is not leading]
    if decision.rule == "highest":
        return _of_single_runs(leading, others, key)
    # Bonferroni: the best of many arms is good by chance more often than one of two is.
    confidence = 1 - (1 - CONFIDENCE) / len(others)
    unclear = []
    for arm in others:
        found = compare(leading, arm, key, confidence)
        rows_of = rows_interval(leading, arm, confidence) if key == HELD_OUT_LOSS else None
        # The mean over shared seeds decides: over all seeds the leader may have been lucky with those it has alone.
        if found is None or sign * found.mean >= 0 or not is_measurable(found, rows_of):
            unclear.append(arm.label)
    # As the loss is spoken of: the leader is the lowest, or the highest, and below the others or above.
    end, side = ("lowest", "below") if sign > 0 else ("highest", "above")
    if unclear:
        sentence = f"best by {name.label}: not distinguishable. {leading.label} is {end}, not measurably {side} "
        return _found(key, None, leading.label, sentence + "; ".join(unclear))
    return _found(
        key, leading.label, leading.label, f"best by {name.label}: {leading.label}, measurably {side} every other"
    )


def is_measurable(found: Difference, rows_of: Interval | None) -> bool | None:
    """Whether all intervals exclude zero, including the one over rows if there is one; None for a single seed."""
    # `and` keeps the None of a single seed: not "no", but "cannot be told".
    return found.is_measurable and (rows_of is None or leaves_zero_out(rows_of))


def _of_single_runs(leading: Arm, others: Sequence[Arm], key: str) -> Best:
    """Find the arm with the best number, unless another has the same to the digits that are shown."""
    name = name_of(key)
    numbers = {arm.label: name.show(_mean(list(arm.values(key).values()))) for arm in (leading, *others)}
    number = numbers[leading.label]
    tied = [label for label, other in numbers.items() if other == number]
    if len(tied) > 1:
        return _found(key, None, leading.label, f"best by {name.label}: none, as {', '.join(tied)} have {number} alike")
    without = next((arm.label for arm in others if is_without_noise(arm)), None)
    against = f" against {numbers[without]} without noise" if without else ""
    sentence = (
        f"best by {name.label}: {leading.label} ({number}{against}), the best number of one run each, as the paper "
        "chose; whether it is chance was not tested"
    )
    return _found(key, leading.label, leading.label, sentence)


def _found(by: str, arm: str | None, leading: str | None, sentence: str) -> Best:
    return {"by": by, "arm": arm, "leading": leading, "sentence": sentence}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
