"""The verbs that look before training: preview, fit, noise, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..display.terminal import echo
from ..errors import UserInputError
from .options import (
    JsonOption,
    OverridesArgument,
    PictureOption,
    RecipeArgument,
    console,
    draw_or_refuse,
    json_only,
    print_json,
    say,
)


def preview(
    name: RecipeArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=0, help="Number of training sequences to show.")] = 3,
    tokens: Annotated[bool, typer.Option("--tokens", help="Mark the boundaries between tokens.")] = False,
    output_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Also write data_report.json and lengths.png to this folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the training data as the model will see it.

    Text that is trained on is marked. Exit code 2 if a run would be refused.
    """
    from ..recipe import load_recipe

    recipe = load_recipe(name, overrides or ())  # before the slow imports: a typo is reported at once
    from ..data.gate import DataRefused
    from ..display.console import RowsProgress
    from ..runner import preview as shown

    try:
        with json_only(as_json):
            found = shown.preview(recipe, rows, None if as_json else RowsProgress(console(stderr=True, highlight=True)))
    except UserInputError as error:
        if as_json:  # a program finds this problem where it finds all others
            print_json({"rows": 0, "tokens": 0, "trained_tokens": 0, "truncated": 0, "problems": [str(error)]})
        raise
    if as_json:
        print_json(shown.to_json(found))
    elif found.report["rows"]:
        shown.render(found, console(), show_tokens=tokens)
    if output_dir is not None:
        say(*(f"written: {path}" for path in shown.save(found, output_dir)))
    if found.report["problems"]:  # last, so that all that can be shown is shown
        raise DataRefused(found.report["problems"], found.report)


def fit(
    name: RecipeArgument,
    overrides: OverridesArgument = None,
    vram: Annotated[
        str | None, typer.Option(metavar="24GiB|CARD", help="Memory or name of the card; default: this machine's.")
    ] = None,
    picture: PictureOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell whether a run fits on a card, before any download.

    No weight is read and no GPU is needed.
    """
    from ..adapter.continued import resolved
    from ..fit import plan_recipe, report
    from ..recipe import load_recipe

    # A run that does not fit is an answer, not a failure: the exit code is 0.
    found = plan_recipe(resolved(load_recipe(name, overrides or ())), vram)
    if as_json:
        print_json(found)
    else:
        echo("\n".join(report.lines(found, name)))
    if picture is not None:
        draw_or_refuse(lambda: report.picture(found, picture, f"{name}: memory of a training step"), picture)


def noise(
    name: RecipeArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Number of training sequences to look at.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Show the noise each sequence gets, beside what transformers' own hook would add."""
    from ..recipe import load_recipe

    recipe = load_recipe(name, overrides or ())
    from ..runner.noise_report import noise_report, render

    with json_only(as_json):
        report = noise_report(recipe, rows=rows)
    if as_json:
        print_json(report)
    else:
        render(report, console(highlight=True))


def doctor(as_json: JsonOption = False) -> None:
    """Check this machine: devices, precision, versions.

    Exit code 1 if training would fail.
    """
    from .doctor import describe, examine

    report = examine()
    if as_json:
        print_json(report)
    else:
        echo(describe(report))
    if report["status"] == "fail":
        raise typer.Exit(1)
