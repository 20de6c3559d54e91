"""The command line: one short function per verb. What is heavy is imported inside the verb that needs it.

Exit codes: 0 done, 1 the run failed, 2 the user's input is wrong, 128 + signal interrupted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import RunFailed, RunInterrupted, UserInputError
from . import compare, generate, publish, recipes
from .evaluate import app as eval_app
from .options import JsonOption, OverridesArgument, RecipeArgument


class _Verbs(TyperGroup):
    """Turns the errors that are meant for the user into one message and an exit code.

    Any other exception is a bug of ours and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserInputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except RunFailed as error:
            typer.echo(f"failed: {error}", err=True)
            raise typer.Exit(1) from error
        except RunInterrupted as error:
            typer.echo(f"interrupted: {error}", err=True)
            raise typer.Exit(128 + error.signal) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    name="qlora-neft",
    cls=_Verbs,
    help="Fine-tune a 4-bit base with LoRA and NEFTune noise as published. Begin with: qlora-neft ls",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes and colors would cost a third of the time --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(recipes.ls)
app.command()(recipes.show)
app.command()(recipes.diff)
app.command()(recipes.cp)
app.command()(recipes.validate)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"qlora-neft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    name: RecipeArgument,
    output_dir: Annotated[Path, typer.Option(file_okay=False, help="Where the adapter and the records of the run go.")],
    overrides: OverridesArgument = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|DIR",
            help="Go on with the run in --output-dir, refuse to, or go on from a folder or checkpoint.",
        ),
    ] = "auto",
    push_to: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Push checkpoints to the branch checkpoints of this Hub repository."),
    ] = None,
    push_every: Annotated[int | None, typer.Option(min=1, help="Of how many checkpoints one is pushed.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and stop before the base is loaded.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter as a recipe says."""
    from ..recipe import load_recipe

    pushing = {"machine.push_to": push_to, "machine.push_every": push_every}
    pushed = [f"{key}={value}" for key, value in pushing.items() if value is not None]
    recipe = load_recipe(name, [*(overrides or ()), *pushed])  # before the slow imports: a typing error is told at once
    from ..runner.run import run

    # With --json standard output holds the summary alone, whatever the libraries below print.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        summary = run(recipe, output_dir, resume=resume, dry_run=dry_run, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))


@app.command()
def preview(
    name: RecipeArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=0, help="Training sequences to show.")] = 3,
    tokens: Annotated[bool, typer.Option("--tokens", help="Put a mark between tokens.")] = False,
    output_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Also write data_report.json and lengths.png there.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the training data as the model will see it.

    Trained text is marked. Exit code 2 if a run would be refused.
    """
    from ..recipe import load_recipe

    recipe = load_recipe(name, overrides or ())
    from .look import show_preview

    show_preview(recipe, rows=rows, tokens=tokens, output_dir=output_dir, as_json=as_json)


@app.command()
def fit(
    name: RecipeArgument,
    overrides: OverridesArgument = None,
    vram: Annotated[
        str | None, typer.Option(metavar="24GiB|CARD", help="Memory or name of the card; default: this machine's.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(dir_okay=False, help="Also draw the memory as a PNG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a run fits, before any download.

    No weight is read and no GPU is needed.
    """
    from ..recipe import load_recipe

    recipe = load_recipe(name, overrides or ())
    from .look import show_fit

    show_fit(recipe, name, vram=vram, picture_path=picture, as_json=as_json)


@app.command()
def noise(
    name: RecipeArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Training examples to look at.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Show the noise each sequence gets, beside transformers' own."""
    from ..recipe import load_recipe

    recipe = load_recipe(name, overrides or ())
    from rich.console import Console

    from ..runner.noise_report import noise_report, render

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        report = noise_report(recipe, rows=rows)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        render(report, Console())


for verb in (
    generate.generate,
    generate.chat,
    publish.merge,
    publish.check,
    publish.gguf,
    publish.export,
    compare.sweep,
    compare.report,
):
    app.command()(verb)
app.add_typer(eval_app)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check this machine: devices, precision, versions.

    Exit code 1 if training would fail.
    """
    from .look import describe, examine

    report = examine()
    typer.echo(json.dumps(report, indent=2) if as_json else describe(report))
    if report["status"] == "fail":
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    # bitsandbytes says, as it is imported on some CPUs, that an optional kernel package is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    app()
