"""How fast a run is, and how long it will still take: from the times of its latest steps, pauses told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from ..run_folder.live import EVALUATING, PREPARING, TRAINING, LiveLine

WINDOW = 60  # stretches between two lines; a machine that slowed down shows within so many


@dataclass(frozen=True)
class Pace:
    """Speed of the session under way.

    Attributes:
        seconds_per_step: Median over the latest steps, evaluations and the first step left out.
        tokens_per_second: Of all ranks, while training.
        seconds_left: To the last step, evaluations included; what is measured after it is not.
    """

    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None

    @property
    def steps_per_minute(self) -> float | None:
        """The same, the other way round."""
        return 60 / self.seconds_per_step if self.seconds_per_step else None


@dataclass(frozen=True)
class _Stretch:
    """What was done between two lines."""

    phase: str
    seconds: float
    steps: int
    tokens: int | None


def pace_of(lines: Sequence[LiveLine]) -> Pace:
    """Measure the session under way; nothing is known before it has taken two steps.

    Args:
        lines: Of ``live.jsonl``, in order; earlier sessions count for nothing, as their machine may have been another.
    """
    session = _session(lines)
    stretches = [
        _Stretch(
            before.phase,
            after.time - before.time,
            after.step - before.step,
            None if before.tokens is None or after.tokens is None else after.tokens - before.tokens,
        )
        for before, after in pairwise(session)
    ]
    trained = [s for s in stretches if s.phase == TRAINING and s.steps > 0 and s.seconds > 0]
    # The first makes caches and kernels.
    trained = (trained[1:] or trained)[-WINDOW:]
    if not trained:
        return Pace()
    # Each step counts once, however many of them two lines are apart.
    seconds = median(s.seconds / s.steps for s in trained for _ in range(min(s.steps, 1000)))
    counted = [s for s in trained if s.tokens is not None and s.tokens > 0]
    ranks = session[-1].ranks or 1
    speed = ranks * sum(s.tokens or 0 for s in counted) / sum(s.seconds for s in counted) if counted else None
    last = session[-1]
    if last.steps is None:
        return Pace(seconds, speed)
    left = max(last.steps - last.step, 0) * seconds + _pauses_left(session, last.steps)
    return Pace(seconds, speed, left)


def evaluation_seconds(lines: Sequence[LiveLine]) -> float | None:
    """Return how long the evaluations of the session take, None if there was none yet."""
    took = [end.time - begin.time for begin, end in _evaluations(_session(lines)) if end is not None]
    return median(took[-5:]) if took else None


def _session(lines: Sequence[LiveLine]) -> Sequence[LiveLine]:
    began = max((i for i, line in enumerate(lines) if line.phase == PREPARING), default=-1)
    return lines[began + 1 :]


def _evaluations(session: Sequence[LiveLine]) -> list[tuple[LiveLine, LiveLine | None]]:
    """Return the first line of each evaluation, and the first after it."""
    found: list[tuple[LiveLine, LiveLine | None]] = []
    begin: LiveLine | None = None
    for line in session:
        if line.phase == EVALUATING:
            begin = begin or line
        elif begin is not None:
            found.append((begin, line))
            begin = None
    return found if begin is None else [*found, (begin, None)]


def _pauses_left(session: Sequence[LiveLine], steps: int) -> float:
    """Return how long the evaluations still to come will take: they come as often as before."""
    evaluations, each = _evaluations(session), evaluation_seconds(session)
    if each is None:
        return 0.0
    at = [begin.step for begin, _ in evaluations]
    # The last gap; after one evaluation, the steps up to it.
    every = at[-1] - at[-2] if len(at) > 1 else at[-1]
    return each * ((steps - at[-1]) // every if every > 0 else 0)
