"""How long ago something was written, by the clock of a machine that may be ahead of ours, or behind."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Ages of what other machines wrote.

    A change that is seen to happen has just happened, whatever time its writer gave it: from then on its age is counted
    by our own clock, and nobody's time is believed.

    Args:
        now: Seconds since 1970.
        steady: Seconds of a clock that nobody sets.
    """

    def __init__(self, now: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._now, self._steady = now, steady
        self._first: set[str] = set()
        self._seen: dict[str, float] = {}

    def age(self, name: str, written: float | None, *, changed: bool) -> float | None:
        """Return the age of something in seconds, None if it was never written.

        Args:
            name: What it is called here.
            written: When it was last written, by its writer's clock.
            changed: Whether it is new since the last call.
        """
        if written is None:
            return None
        if changed and name in self._first:
            self._seen[name] = self._steady()
        self._first.add(name)
        if name in self._seen:
            return self._steady() - self._seen[name]
        return max(self._now() - written, 0.0)  # a clock ahead of ours
