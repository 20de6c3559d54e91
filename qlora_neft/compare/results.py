"""The results of some arms: as plain values for ``results.json``, tables and pictures, with what they allow to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .alike import Kind, kinds_of
from .arms import Arm, baseline_of, compare, pairing, rows_interval
from .decide import BY_HELD_OUT_LOSS, HELD_OUT_LOSS, Decision, best, is_measurable
from .results_file import ArmMeasure, MeasureResults, PairedDifference, Results
from .statistics import CONFIDENCE, RESAMPLES, Difference, Interval
from .tables import KNOWN, MeasureName, in_order, name_of

METHOD = (
    f"Differences are paired over seeds. Intervals hold {CONFIDENCE:.0%}: Student's t over the seeds, and a percentile "
    f"bootstrap of whole pairs (B = {RESAMPLES:,}, fixed seed). A difference is measurable when both leave zero out. "
    "With three seeds the bootstrap's ends are the smallest and the largest difference. Where the losses of single "
    "held-out rows are known, a bootstrap over rows must leave zero out as well. The best arm is named only if "
    "the deciding measure, held-out loss unless told otherwise, is measurably better than every other arm's, the "
    "confidence raised for the number of comparisons (Bonferroni). Numbers made in different ways are not compared. "
    "Seeds, intervals and held-out loss are this project's; NEFTune's authors chose alpha from single runs by win rate."
)


def results_of(arms: Sequence[Arm], *, first: bool = False, decision: Decision = BY_HELD_OUT_LOSS) -> Results:
    """Return every measure of every arm, the differences to the baseline, and a sentence on each.

    Args:
        arms: The arms to compare.
        first: As in `baseline_of`.
        decision: What decides which arm is best.
    """
    runs = [run for arm in arms for run in arm.runs]
    keys = in_order(_telling([run.values for run in runs]))
    kinds = [kind for key in keys for kind in kinds_of(key, runs)]
    return {
        "method": METHOD,
        "arms": [{"label": arm.label, "settings": arm.settings, "runs": [r.name for r in arm.runs]} for arm in arms],
        "pairing": [{"arm": arm.label, "to": base.label, **pairing(arm, base)} for arm, base in _compared(arms, first)],
        "measures": {kind.name: _measure(kind, arms, first) for kind in kinds},
        "best": best(arms, decision),
    }


def _telling(found: Sequence[Mapping[str, float]]) -> set[str]:
    """Return the measures to compare: all except counts (rows, chunk) that are the same for every run."""
    keys = {key for values in found for key in values}
    return {k for k in keys if k in KNOWN or len(found) == 1 or len({values.get(k) for values in found}) > 1}


def _compared(arms: Sequence[Arm], first: bool) -> list[tuple[Arm, Arm]]:
    found = [(arm, baseline_of(arm, arms, first=first)) for arm in arms]
    return [(arm, base) for arm, base in found if base is not None]


def _measure(kind: Kind, arms: Sequence[Arm], first: bool) -> MeasureResults:
    name = name_of(kind.name)
    rows: list[ArmMeasure] = []
    compared: list[tuple[str, PairedDifference]] = []
    for arm in arms:
        values = arm.values(kind)
        mean, low, high = _spread(list(values.values()))
        row: ArmMeasure = {"arm": arm.label, "values": values, "mean": mean, "min": low, "max": high}
        base = baseline_of(arm, arms, first=first)
        found = compare(arm, base, kind) if base else None
        if base and found:
            # Losses by row are kept of held-out rows alone.
            rows_of = rows_interval(arm, base) if kind.key == HELD_OUT_LOSS else None
            row["difference"] = _plain(found, base.label, rows_of)
            compared.append((arm.label, row["difference"]))
        rows.append(row)
    verdict = _verdict(compared, name)
    return {
        "label": name.label,
        "unit": name.unit,
        "better": name.better,
        "made": None if kind.made is None else dict(kind.made),
        "arms": rows,
        "verdict": verdict,
    }


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
