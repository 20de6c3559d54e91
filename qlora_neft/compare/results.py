"""The results of some arms: as plain values for ``results.json``, tables and pictures, with what they allow to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .arms import Arm, baseline_of, compare, pairing, rows_interval
from .results_file import ArmMeasure, Best, MeasureResults, PairedDifference, Results
from .statistics import CONFIDENCE, RESAMPLES, Difference, Interval, leaves_zero_out
from .tables import KNOWN, MeasureName, in_order, name_of

DECIDING = "held_out_loss"
METHOD = (
    f"Differences are paired over seeds. Intervals hold {CONFIDENCE:.0%}: Student's t over the seeds, and a percentile "
    f"bootstrap of whole pairs (B = {RESAMPLES:,}, fixed seed). A difference is measurable when both leave zero out. "
    "With three seeds the bootstrap's ends are the smallest and the largest difference. Where the losses of single "
    "held-out rows are known, a bootstrap over rows must leave zero out as well. The best arm is named only if "
    "its held-out loss is measurably below that of every other arm, the confidence raised for the number of "
    "comparisons (Bonferroni)."
)


def results_of(arms: Sequence[Arm], *, first: bool = False) -> Results:
    """Return every measure of every arm, the differences to the baseline, and a sentence on each.

    Args:
        arms: The arms to compare.
        first: As in `baseline_of`.
    """
    keys = in_order(_telling([run.values for arm in arms for run in arm.runs]))
    return {
        "method": METHOD,
        "arms": [{"label": arm.label, "settings": arm.settings, "runs": [r.name for r in arm.runs]} for arm in arms],
        "pairing": [{"arm": arm.label, "to": base.label, **pairing(arm, base)} for arm, base in _compared(arms, first)],
        "measures": {key: _measure(key, arms, first) for key in keys},
        "best": best(arms),
    }


def _telling(found: Sequence[Mapping[str, float]]) -> set[str]:
    """Return the measures to compare: all except counts (rows, chunk) that are the same for every run."""
    keys = {key for values in found for key in values}
    return {k for k in keys if k in KNOWN or len(found) == 1 or len({values.get(k) for values in found}) > 1}


def _compared(arms: Sequence[Arm], first: bool) -> list[tuple[Arm, Arm]]:
    found = [(arm, baseline_of(arm, arms, first=first)) for arm in arms]
    return [(arm, base) for arm, base in found if base is not None]


def _measure(key: str, arms: Sequence[Arm], first: bool) -> MeasureResults:
    name = name_of(key)
    rows: list[ArmMeasure] = []
    compared: list[tuple[str, PairedDifference]] = []
    for arm in arms:
        values = arm.values(key)
        mean, low, high = _spread(list(values.values()))
        row: ArmMeasure = {"arm": arm.label, "values": values, "mean": mean, "min": low, "max": high}
        base = baseline_of(arm, arms, first=first)
        found = compare(arm, base, key) if base else None
        if base and found:
            # Losses by row are kept of held-out rows alone.
            rows_of = rows_interval(arm, base) if key == DECIDING else None
            row["difference"] = _plain(found, base.label, rows_of)
            compared.append((arm.label, row["difference"]))
        rows.append(row)
    verdict = _verdict(compared, name)
    return {"label": name.label, "unit": name.unit, "better": name.better, "arms": rows, "verdict": verdict}


def _spread(values: Sequence[float]) -> tuple[float, float, float] | tuple[None, None, None]:
    """Return mean, minimum and maximum."""
    return (_mean(values), min(values), max(values)) if values else (None, None, None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain(found: Difference, to: str, rows_of: Interval | None) -> PairedDifference:
    plain: PairedDifference = {
        "to": to,
        "values": list(found.values),
        "mean": found.mean,
        "t_interval": found.t_interval,
        "bootstrap_interval": found.bootstrap,
        "measurable": is_measurable(found, rows_of),
    }
    return plain if rows_of is None else {"rows_interval": rows_of, **plain}


def is_measurable(found: Difference, rows_of: Interval | None) -> bool | None:
    """Whether all intervals exclude zero, including the one over rows if there is one; None for a single seed."""
    # `and` keeps the None of a single seed: not "no", but "cannot be told".
    return found.is_measurable and (rows_of is None or leaves_zero_out(rows_of))


def _verdict(compared: Sequence[tuple[str, PairedDifference]], name: MeasureName) -> str:
    """Return one sentence, empty if there is nothing to compare with."""
    if not compared:
        return ""
    if all(found["measurable"] is None for _, found in compared):
        return "one seed: no difference can be told from chance"
    clear = [f"{label} {name.show_difference(found['mean'])}" for label, found in compared if found["measurable"]]
    unclear = [label for label, found in compared if not found["measurable"]]
    if not clear:
        return "no measurable difference"
    # A label of two settings holds a comma itself.
    between = "; " if any("," in label for label, _ in compared) else ", "
    rest = f"; no measurable difference: {between.join(unclear)}" if unclear else ""
    return f"measurable: {between.join(clear)}{rest}"


def best(arms: Sequence[Arm], measure: str = DECIDING) -> Best:
    """Find the arm with the lowest held-out loss, and whether its lead can be told from chance.

    Args:
        arms: The arms to compare.
        measure: A measure of which less is better.

    Returns:
        ``arm`` (None if it cannot), ``lowest`` (the arm with the lowest mean in any case) and a ``sentence``.
    """
    measured = [arm for arm in arms if arm.values(measure)]
    label = name_of(measure).label
    if len(measured) < 2:
        return {"arm": None, "lowest": None, "sentence": f"{label}: measured in fewer than two arms"}
    # Chosen by the mean over all its seeds, then compared over shared ones.
    lowest = min(measured, key=lambda arm: _mean(list(arm.values(measure).values())))
    others = [arm for arm in measured if arm is not lowest]
    # Bonferroni: the lowest of many arms is low by chance more often than one of two is.
    confidence = 1 - (1 - CONFIDENCE) / len(others)
    unclear = []
    for arm in others:
        found = compare(lowest, arm, measure, confidence)
        # The mean over shared seeds decides: over all seeds the lowest may have been lucky with those it has alone.
        if found is None or found.mean >= 0 or not is_measurable(found, rows_interval(lowest, arm, confidence)):
            unclear.append(arm.label)
    if unclear:
        sentence = f"best by {label}: not distinguishable. {lowest.label} is lowest, not measurably below "
        return {"arm": None, "lowest": lowest.label, "sentence": sentence + "; ".join(unclear)}
    sentence = f"best by {label}: {lowest.label}, measurably below every other"
    return {"arm": lowest.label, "lowest": lowest.label, "sentence": sentence}
