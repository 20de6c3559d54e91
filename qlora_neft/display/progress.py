"""A run while it trains, as shown to a user: a progress bar on a terminal, plain lines in a pipe, and its speed.

A module apart from `console`, since `TrainerCallback` imports PEFT and bitsandbytes, which no other display needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

LOSSES = (("loss", "loss"), ("clean_loss", "clean"), ("eval_loss", "held out"))  # log key and what a user reads
WARM_UP, MEASURED = 1, 4  # steps: the first is slower, as caches and kernels are made in it


class ProgressLines(TrainerCallback):
    """Shows training as a progress bar on a terminal, as one line per log entry in a pipe.

    Args:
        console: Console to write to.
    """

    def __init__(self, console: Console) -> None:
        self.console, self.latest = console, dict[str, float]()
        self.bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar if the console is a terminal."""
        if self.console.is_terminal and state.is_world_process_zero:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task("", total=state.max_steps)
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the losses of a log entry."""
        news = {name: logs[key] for key, name in LOSSES if logs and key in logs}
        if not news or not state.is_world_process_zero:
            return
        # Training and evaluation log in entries of their own; the bar shows the latest of each.
        self.latest |= news
        if self.bar is not None:
            self.bar.update(self.task, description="  ".join(f"{k} {v:.3f}" for k, v in self.latest.items()))
        else:
            values = "  ".join(f"{name} {value:.4f}" for name, value in news.items())
            self.console.print(f"step {state.global_step}/{state.max_steps}  {values}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the bar."""
        self.close()

    def close(self) -> None:
        """Stop the bar; also called after an exception, which skips `on_train_end`."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class SpeedLine(TrainerCallback):
    """Times a few steps at the start of a session and says once how fast it is and how long it will take.

    Args:
        tokens_seen: Returns the number of tokens trained on so far.
        say: Receives the line.

    Attributes:
        tokens_per_second: The measured speed, None until it is measured.
    """

    def __init__(self, tokens_seen: Callable[[], int], say: Callable[[str], None]) -> None:
        self.tokens_seen, self.say, self.steps = tokens_seen, say, 0
        self.tokens_per_second: float | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the time after the warm-up, and say the speed after the measured steps."""
        # Counted here, since global_step goes on from an earlier session.
        self.steps += 1
        if self.steps == WARM_UP:
            self._began, self._tokens = time.monotonic(), self.tokens_seen()
        if self.steps != WARM_UP + MEASURED:
            return
        # Never 0, which a coarse clock could measure on a tiny model.
        seconds = max(time.monotonic() - self._began, 1e-9)
        self.tokens_per_second = (self.tokens_seen() - self._tokens) / seconds
        left = (state.max_steps - state.global_step) * seconds / MEASURED
        self.say(f"speed: {self.tokens_per_second:,.0f} tokens a second; about {_shown(left)} left")


def _shown(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
