"""The verb train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOption, OverridesArgument, RecipeArgument, json_only, print_json


def train(
    name: RecipeArgument,
    output_dir: Annotated[Path, typer.Option(file_okay=False, help="Folder for the adapter and the run's records.")],
    overrides: OverridesArgument = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|DIR",
            help="auto: continue the run in --output-dir; never: refuse to; DIR: continue from this run or checkpoint.",
        ),
    ] = "auto",
    push_to: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Push checkpoints to the branch `checkpoints` of this Hub repository."),
    ] = None,
    push_every: Annotated[int | None, typer.Option(min=1, help="Push every N-th checkpoint.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and stop before the base is loaded.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter from a recipe."""
    from ..imports import imports_that_stay
    from ..recipe import load_recipe

    pushing = {"machine.push_to": push_to, "machine.push_every": push_every}
    pushed = [f"{key}={value}" for key, value in pushing.items() if value is not None]
    recipe = load_recipe(name, [*(overrides or ()), *pushed])  # before the slow imports: a typo is reported at once
    with imports_that_stay():
        from ..runner.run import run

    with json_only(as_json):
        summary = run(recipe, output_dir, resume=resume, dry_run=dry_run, quiet=as_json)
    if as_json:
        print_json(summary)
