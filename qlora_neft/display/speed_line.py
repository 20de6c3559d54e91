"""How fast training turned out to be, once the first steps are taken, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

WARM_UP, MEASURED = 1, 4  # steps: the first is slower, with caches and kernels still to be made


class SpeedLine(TrainerCallback):
    """Times a few steps at the start of a session and says tokens a second and time left; once.

    Args:
        tokens_seen: Gives the tokens trained on so far.
        say: Told the line.
    """

    def __init__(self, tokens_seen: Callable[[], int], say: Callable[[str], None]) -> None:
        self.tokens_seen, self.say, self.steps = tokens_seen, say, 0
        self.tokens_per_second: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time after the warm-up, and speak after the measured steps."""
        self.steps += 1
        if self.steps == WARM_UP:
            self._began, self._tokens = time.monotonic(), self.tokens_seen()
        if self.steps != WARM_UP + MEASURED:
            return
        seconds = max(time.monotonic() - self._began, 1e-9)
        self.tokens_per_second = (self.tokens_seen() - self._tokens) / seconds
        left = (state.max_steps - state.global_step) * seconds / MEASURED
        self.say(f"speed: {self.tokens_per_second:,.0f} tokens a second; about {_shown(left)} left")


def _shown(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
