"""A run before and after it trains, as shown to a user; `progress` shows it meanwhile.

Messages of libraries that are meant for developers are kept out.
"""

from __future__ import annotations

import logging
import shlex
import time
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets.utils import logging as datasets_logging
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from transformers.utils import logging as transformers_logging

from ..hub_client import bound_waits
from ..noise.neftune import expected_norm
from ..paths import kind_of
from .safe_console import SafeConsole
from .tables import Table
from .terminal import printable, shown

SECONDS_BETWEEN_LINES = 10.0  # on progress, in a pipe
NO_CURVES = "no loss.png: matplotlib is missing. Install the extra: pip install 'qlora-neft[plots]'"

if TYPE_CHECKING:
    from ..recipe.schema import Neftune, Recipe


def make_console(*, quiet: bool = False, silent: bool = False) -> Console:
    """Return a console that writes to stdout.

    Args:
        quiet: Write to stderr instead, since a program reads stdout.
        silent: Write nowhere.
    """
    # soft_wrap: the terminal wraps, so that paths and commands can be copied whole and a pipe gets full lines.
    return SafeConsole(stderr=quiet, highlight=False, soft_wrap=True, quiet=silent)


def say(console: Console, lines: Iterable[str]) -> None:
    """Print lines; square brackets are not markup, and control characters are escaped."""
    for line in lines:
        console.print(shown(line), markup=False)


@contextmanager
def quiet_libraries() -> Generator[None, None, None]:
    """Inside the block, hide progress bars and deprecation notes of libraries; their warnings stay."""
    verbosity = datasets_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = datasets.utils.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    bound_waits()  # of downloads that libraries make
    datasets_logging.set_verbosity(logging.CRITICAL)  # it logs an error, then raises it: once is enough
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        datasets_logging.set_verbosity(verbosity[0])
        transformers_logging.set_verbosity(verbosity[1])
        if bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers_logging.enable_progress_bar()


def noise_line(noise: Neftune | None) -> str:
    """Return a line on the noise that a run adds."""
    if noise is None or not (noise.noise_alpha or noise.final_alpha):
        return "noise: none"
    way = "" if noise.schedule == "constant" else f", {noise.schedule} to {noise.final_alpha:g}"
    norm = expected_norm(noise.noise_alpha, noise.distribution)
    drawn = f"alpha {noise.noise_alpha:g}{way}, {noise.distribution}, norm {norm:.2f} per sequence"
    passes, size = noise.adversarial_steps, noise.adversarial_step_size
    if noise.symmetric:
        return f"noise: SymNoise {drawn}, with both signs: 2 passes a step, which costs twice as much"
    if passes == 1:
        return f"noise: NEFTune {drawn}"
    return f"noise: FreeLB {drawn}, climbing by {size:g}: {passes} passes a step, which costs {passes} times as much"


def data_lines(report: Mapping[str, Any]) -> list[str]:
    """Return lines on the data: sources, rows and tokens, what was truncated or dropped, and warnings.

    Args:
        report: As `prepare_data` made it.
    """
    lines = [
        f"data: {source['path']}, {source['format']}, prompt template {source['prompt_template']}"
        for source in report["sources"]
    ]
    for name in ("train", "eval"):
        if report[name] is not None:
            rows = report[name]
            cut = f", {rows['truncated']} truncated" * bool(rows["truncated"])
            gone = f", {rows['dropped']} dropped" * bool(rows["dropped"])
            share = f", {rows['share_trained']:.0%} of them trained"
            lines.append(f"{name} data: {rows['rows']} rows, {rows['tokens']} tokens{share}{cut}{gone}")
    return lines + [f"warning: {warning}" for warning in report["warnings"]]


def lines_after(
    output_dir: Path,
    base: str,
    steps: int,
    seconds: float,
    *,
    drawn: bool,
    merges: bool = True,
    of_text_part: bool = False,
) -> list[str]:
    """Return lines on where everything is, and what to do next.

    Args:
        output_dir: Folder of the run.
        base: The base's Hub id or path.
        steps: Optimizer steps trained.
        seconds: Time they took.
        drawn: Whether ``loss.png`` was drawn.
        merges: Whether `qlora-neft merge` accepts the adapter.
        of_text_part: Whether programs that load the whole base do not find its layers, so that they need the merge.
    """
    curves = f"loss curves: {output_dir / 'loss.png'}"
    here, merged = shlex.quote(str(output_dir)), shlex.quote(f"{output_dir}-merged")
    why = "for vLLM and all that loads the whole base" if of_text_part else "a plain 16-bit model, with proof"
    base_id = " --base-id owner/base" * (kind_of(base) != "hub")  # a local base is never published
    return [
        f"trained {steps} steps in {seconds:.0f} s; base weights unchanged, bit for bit",
        f"adapter, recipe, metrics and summary: {output_dir}/",
        curves if drawn else NO_CURVES,
        "next:",
        f"  qlora-neft chat {here} --compare   # talk to it, beside its base",
        *([f"  qlora-neft merge {here} {merged}   # {why}"] if merges else []),
        f"  qlora-neft export {here} --repo-id you/name{base_id} --dry-run   # what would go to the Hub",
        "  qlora-neft cp llama2-7b-alpaca mine.yaml   # a recipe of your own",
    ]


def lines_after_in_full(output_dir: Path, steps: int, seconds: float, *, drawn: bool) -> list[str]:
    """Return the lines of `lines_after` for a model that was trained in full; the arguments are the same."""
    here = shlex.quote(str(output_dir))
    return [
        f"trained {steps} steps in {seconds:.0f} s; every weight was trained",
        f"model, recipe, metrics and summary: {output_dir}/",
        f"loss curves: {output_dir / 'loss.png'}" if drawn else NO_CURVES,
        "next:",
        f"  transformers chat {here}   # or AutoModelForCausalLM.from_pretrained({str(output_dir)!r})",
        f"  vllm serve {here}   # a plain model, in float32; --dtype bfloat16 halves it",
    ]


def title(recipe: Recipe) -> str:
    """Return the heading of a picture: base, data and noise of a recipe."""
    alpha = recipe.neftune.noise_alpha if recipe.neftune else 0
    return f"{recipe.model.name_or_path} on {recipe.data.path}, alpha {alpha:g}"


def show_result(console: Console, before: Mapping[str, float | None], after: Mapping[str, float | None]) -> None:
    """Print a table of the measures before and after training."""
    measures = (
        ("held-out loss (nats per token)", "held_out_loss", "{:.3f}"),
        ("exact answers, held out", "exact_match", "{:.1%}"),
        ("clean train loss (nats per token)", "clean_train_loss", "{:.3f}"),
    )
    rows = [
        (label, form.format(before[key]), form.format(after[key]))
        for label, key, form in measures
        if before.get(key) is not None and after.get(key) is not None
    ]
    console.print(Table(("", "before", "after"), rows, title="what was learned", align="l").rich())


def show_answers(console: Console, answers: Iterable[tuple[str, str, str, str]]) -> None:
    """Print sample answers: for each a prompt, the answers before and after training, and the reference."""
    for prompt, before, after, reference in answers:
        grid = RichTable.grid(padding=(0, 2))
        grid.add_row("prompt", Text(_request(prompt), style="bold"))
        grid.add_row("before", Text(_one_line(before), style="dim"))
        grid.add_row("after", Text(_one_line(after)))
        grid.add_row("wanted", Text(_one_line(reference)))
        console.print(grid)
        console.print()


def _request(prompt: str) -> str:
    """Return the part of a prompt that differs from row to row."""
    # Alpaca's prompt begins with the same lines in every row.
    if "### Instruction:\n" in prompt:
        body = prompt.split("### Instruction:\n")[-1].removesuffix("### Response:")
        return _one_line(body.replace("### Input:\n", ""), 200)
    flat = printable(" ".join(prompt.split()))
    return flat if len(flat) <= 200 else "..." + flat[-197:]  # a conversation ends with its last request


def _one_line(text: str, width: int = 110) -> str:
    flat = printable(" ".join(text.split()))
    return flat if len(flat) <= width else flat[: width - 3] + "..."


class RowsProgress:
    """Shows the number of rows prepared so far: on a terminal in one place, in a pipe as a line now and then.

    Args:
        console: Console to write to.
    """

    def __init__(self, console: Console) -> None:
        self.console, self.rows = console, 0
        self._said = time.monotonic()

    def __call__(self, rows: int) -> None:
        """Count more rows."""
        self.rows += rows
        line, now = f"preparing data: {self.rows:,} rows", time.monotonic()
        if self.console.is_terminal:
            self.console.print(line, end="\r")
        # Rows that take a moment need no line: the result follows.
        elif now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            self.console.print(line, markup=False)
