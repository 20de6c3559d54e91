"""The verb that finds a learning rate."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .compare import check_parallel, outliving_the_reader, runner_of
from .options import JsonOption, OverridesArgument, RecipeArgument, check_parent, print_json


def tune(
    name: RecipeArgument,
    overrides: OverridesArgument = None,
    output_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for the runs and the curve; default: tune-NAME.")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="R1,R2,...", help="Rates to try; default: half decades around the recipe's, extended at need."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each run, which the schedule spans. Default: 50.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each rate; seeds count up from the recipe's.")] = 1,
    output: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="The copy of the recipe to write; default: tuned.yaml in --output-dir."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the copy if it is there.")] = False,
    parallel: Annotated[int, typer.Option(min=1, help="Number of runs at a time, on CPUs.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe and data, say what it would cost, and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find a recipe's learning rate by short runs, and write a copy with it.

    The runs differ in the rate alone. Repeat the command to continue an interrupted search.
    """
    from ..compare.rates import rates_of

    words = list(overrides or ())
    tried = None if rates is None else rates_of(rates)
    folder = output_dir or Path(f"tune-{Path(name).stem}")
    copy = output or folder / "tuned.yaml"
    if output is not None:
        check_parent(output)
    from ..compare.tuned_recipe import check_output

    check_output(copy, folder, force=force)
    # Heavier imports from here on.
    from ..compare.show import SweepDisplay, show_plan
    from ..compare.tune import MEASURES, check_search, plan_search
    from ..compare.tune import tune as run_tune
    from ..compare.tune_picture import show_tuned

    search = plan_search(name, words, folder, rates=tried, steps=steps, seeds=seeds)
    check_parallel(search.plan(search.rates), parallel)
    if dry_run:
        show_plan(check_search(search, folder), as_json=as_json)
        return
    options = {
        "--output-dir": folder,
        "--rates": rates,
        "--steps": steps,
        "--seeds": seeds,
        "--output": output,
        "--parallel": parallel,
    }
    defaults = {"--rates": None, "--steps": None, "--seeds": 1, "--output": None, "--parallel": 1}
    stated = [str(part) for pair in options.items() if defaults.get(pair[0], "") != pair[1] for part in pair]
    command = shlex.join(["qlora-neft", "tune", name, *words, *stated, *(["--force"] if force else [])])
    with outliving_the_reader(folder), SweepDisplay(quiet=as_json) as display:
        runner = runner_of(folder, list(MEASURES), parallel)
        results = run_tune(search, folder, copy, runner, display, force=force, parallel=parallel, command=command)
    if as_json:
        print_json(results)
    else:
        show_tuned(results, folder)
