"""The verbs under eval: one short function each. What is heavy is imported inside the verb that needs it."""

from __future__ import annotations

import typer

from . import noise_and_harness, runs, texts

app = typer.Typer(
    name="eval",
    help="Measure what the NEFTune paper measures.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(texts.text)
app.command()(texts.alpaca)
app.command()(runs.overfit)
app.command()(runs.loss)
app.command()(noise_and_harness.noise)
app.command()(noise_and_harness.harness)
