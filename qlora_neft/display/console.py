"""What a person sees of a run before and after it trains; what it shows meanwhile is in `progress`."""

from __future__ import annotations

import logging
import shlex
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import transformers
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ..noise.neftune import expected_norm
from ..paths import kind_of
from .tables import Table


def make_console(*, quiet: bool = False, silent: bool = False) -> Console:
    """A console on stdout, on stderr where stdout is kept for a program (``quiet``), or nowhere (``silent``)."""
    return Console(stderr=quiet, highlight=False, soft_wrap=True, quiet=silent)


def say(console: Console, lines: Iterable[str]) -> None:
    """Print lines as they are, square brackets included."""
    for line in lines:
        console.print(line, markup=False)


def show_result(console: Console, before: dict[str, Any], after: dict[str, Any]) -> None:
    """A table of what training changed."""
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
    """Sample answers: a prompt, its answers before and after training, and the reference."""
    for prompt, before, after, reference in answers:
        grid = RichTable.grid(padding=(0, 2))
        grid.add_row("prompt", Text(_request(prompt), style="bold"))
        grid.add_row("before", Text(_one_line(before), style="dim"))
        grid.add_row("after", Text(_one_line(after)))
        grid.add_row("wanted", Text(_one_line(reference)))
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


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside the block: no upstream progress bars, no deprecation notes meant for developers, warnings kept."""
    verbosity = datasets.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    bars = datasets.utils.is_progress_bar_enabled(), transformers.utils.logging.is_progress_bar_enabled()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs an error, then raises it: once is enough
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        datasets.logging.set_verbosity(verbosity[0])
        transformers.utils.logging.set_verbosity(verbosity[1])
        if bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers.utils.logging.enable_progress_bar()


class RowsProgress:
    """Counts rows while data is prepared; on a terminal only, since a pipe gets the result in a moment.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console, self.rows = console, 0

    def __call__(self, rows: int) -> None:
        """So many rows more."""
        self.rows += rows
        if self.console.is_terminal:
            self.console.print(f"preparing data: {self.rows:,} rows", end="\r")


def noise_line(noise: Mapping[str, Any] | None) -> str:
    """What noise the run adds; ``noise`` holds ``noise_alpha``, ``distribution``, ``schedule``, ``final_alpha``."""
    if noise is None or not (noise["noise_alpha"] or noise["final_alpha"]):
        return "noise: none"
    way = "" if noise["schedule"] == "constant" else f", {noise['schedule']} to {noise['final_alpha']:g}"
    norm = expected_norm(noise["noise_alpha"], noise["distribution"])
    drawn = f"alpha {noise['noise_alpha']:g}{way}, {noise['distribution']}, norm {norm:.2f} per sequence"
    passes, size = noise["adversarial_steps"], noise["adversarial_step_size"]
    if passes == 1:
        return f"noise: NEFTune {drawn}"
    return f"noise: FreeLB {drawn}, climbing by {size:g}: {passes} passes a step, which costs {passes} times as much"


def data_lines(report: Mapping[str, Any]) -> list[str]:
    """Sources, rows and tokens of each part of the data, what was cut or left out, and what is suspicious."""
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


def lines_after(output_dir: Path, base: str, steps: int, seconds: float, *, drawn: bool) -> list[str]:
    """Where everything is, and what to do next."""
    curves = f"loss curves: {output_dir / 'loss.png'}"
    here = shlex.quote(str(output_dir))
    base_id = " --base-id owner/base" * (kind_of(base) != "hub")  # a local base is never published
    missing = "no loss.png: matplotlib is missing. Install the extra: pip install 'qlora-neft[plots]'"
    return [
        f"trained {steps} steps in {seconds:.0f} s; base weights unchanged, bit for bit",
        f"adapter, recipe, metrics and summary: {output_dir}/",
        curves if drawn else missing,
        "next:",
        f"  qlora-neft chat {here} --compare   # talk to it, beside its base",
        f"  qlora-neft merge {here} {shlex.quote(f'{output_dir}-merged')}   # a plain 16-bit model, with proof",
        f"  qlora-neft export {here} --repo-id you/name{base_id} --dry-run   # what would go to the Hub",
        "  qlora-neft cp llama2-7b-alpaca mine.yaml   # a recipe of your own",
    ]


def title(recipe: Mapping[str, Any]) -> str:
    """Over a picture: which base learned what, under how much noise."""
    alpha = (recipe["neftune"] or {}).get("noise_alpha", 0)
    return f"{recipe['model']['name_or_path']} on {recipe['data']['path']}, alpha {alpha:g}"
