"""What a person sees of a run: progress on a terminal, plain lines in a pipe, a table at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from ..decoding.answers import Answer

SHOWN = (("loss", "loss"), ("clean_loss", "clean"), ("eval_loss", "held out"))


def make_console(*, quiet: bool = False, silent: bool = False) -> Console:
    """A console on stdout, on stderr where stdout is kept for a program (``quiet``), or nowhere (``silent``)."""
    return Console(stderr=quiet, highlight=False, soft_wrap=True, quiet=silent)


def say(console: Console, lines: Iterable[str]) -> None:
    """Print lines as they are, square brackets included."""
    for line in lines:
        console.print(line, markup=False)


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


def show_result(console: Console, before: dict[str, Any], after: dict[str, Any]) -> None:
    """A table of what training changed."""
    table = Table("", "before", "after", title="what was learned", title_justify="left")
    rows = (
        ("held-out loss (nats per token)", "held_out_loss", "{:.3f}"),
        ("exact answers, held out", "exact_match", "{:.1%}"),
        ("clean train loss (nats per token)", "clean_train_loss", "{:.3f}"),
    )
    for label, key, form in rows:
        if before.get(key) is not None and after.get(key) is not None:
            table.add_row(label, form.format(before[key]), form.format(after[key]))
    console.print(table)


def show_answers(console: Console, before: list[Answer], after: list[Answer], count: int = 3) -> None:
    """Sample answers, before and after."""
    for old, new in list(zip(before, after, strict=True))[:count]:
        grid = Table.grid(padding=(0, 2))
        grid.add_row("prompt", Text(_request(old.prompt), style="bold"))
        grid.add_row("before", Text(_one_line(old.text), style="dim"))
        grid.add_row("after", Text(_one_line(new.text)))
        grid.add_row("wanted", Text(_one_line(new.reference)))
        console.print(grid)
        console.print()


def _request(prompt: str) -> str:
    """The part of a prompt that differs from row to row."""
    if "### Instruction:\n" in prompt:
        body = prompt.split("### Instruction:\n")[-1].removesuffix("### Response:")
        return _one_line(body.replace("### Input:\n", ""), 200)
    flat = " ".join(prompt.split())
    return flat if len(flat) <= 200 else "..." + flat[-197:]  # a conversation's last request stands at its end


def _one_line(text: str, width: int = 110) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."
