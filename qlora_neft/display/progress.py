"""What a person sees while a run trains: a progress bar or a line per log, and once its speed.

Apart from `console`, since `TrainerCallback` brings PEFT and bitsandbytes with it, which no other display needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

SHOWN = (("loss", "loss"), ("clean_loss", "clean"), ("eval_loss", "held out"))
WARM_UP, MEASURED = 1, 4  # steps: the first is slower, with caches and kernels still to be made


class ProgressLines(TrainerCallback):
    """A progress bar on a terminal; in a pipe one plain line per log.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console, self.latest = console, {}
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, if anyone is looking."""
        if self.console.is_terminal and state.is_world_process_zero:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task("", total=state.max_steps)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the losses just measured."""
        news = {name: logs[key] for key, name in SHOWN if logs and key in logs}
        if not news or not state.is_world_process_zero:
            return
        self.latest |= news
        if self.bar is not None:
            self.bar.update(self.task, description="  ".join(f"{k} {v:.3f}" for k, v in self.latest.items()))
        else:
            values = "  ".join(f"{name} {value:.4f}" for name, value in news.items())
            self.console.print(f"step {state.global_step}/{state.max_steps}  {values}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an exception."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


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
