"""The verbs that compare runs: sweep and report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserInputError
from .options import JsonOption, RecipeArgument, check_parent, complete_override, print_json

if TYPE_CHECKING:
    from ..compare.plan import SweepPlan
    from ..compare.queue import Runner

WordsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="KEY=V1,V2,...",
        help="Keys to sweep with their values, such as neftune.noise_alpha=0,5,10,15; a key with one value is the "
        "same override in every run.",
        autocompletion=complete_override,
    ),
]


def sweep(
    name: RecipeArgument,
    words: WordsArgument,
    output_dir: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for the runs and their results; default: sweep-NAME-KEYS."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per setting; seeds count up from the recipe's.")] = 3,
    as_list: Annotated[
        bool,
        typer.Option("--list/--grid", help="Pair the values of several keys by position, or combine all of them."),
    ] = False,
    measure: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Measures to take after training, comma-separated; see docs/sweeps.md."),
    ] = "",
    parallel: Annotated[int, typer.Option(min=1, help="Number of runs at a time, on CPUs.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check model, data and plan of each run, and list them with their tokens.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe under several settings, and compare them.

    Runs of one seed differ only in what is swept. Repeat the command to continue an interrupted sweep.
    """
    from ..compare.plan import check_held_out, check_measures, plan_sweep

    measures = [word for word in (part.strip() for part in measure.split(",")) if word]
    # All checks of words come before the slow imports.
    check_measures(measures)
    # Every run's recipe is checked here: a wrong value is reported before the first run begins.
    plan = plan_sweep(name, words, seeds=seeds, combine="list" if as_list else "grid")
    check_held_out(measures, plan)
    _check_parallel(plan, parallel)
    output_dir = output_dir or Path("-".join(["sweep", Path(name).stem, *(key.split(".")[-1] for key in plan.keys)]))
    # Heavier imports from here on.
    from ..compare.show import SweepDisplay, show_plan, show_results

    if dry_run:
        from ..compare.sweep import check_runs

        show_plan(check_runs(plan, output_dir), as_json=as_json)
        return
    from ..compare.sweep import sweep as run_sweep

    with SweepDisplay(quiet=as_json) as display:
        runner = runner_of(output_dir, measures, parallel)
        options = {"--seeds": seeds, "--output-dir": output_dir, "--measure": measure, "--parallel": parallel}
        command = _command(name, words, options, as_list)
        results = run_sweep(plan, output_dir, runner, display, measures=measures, parallel=parallel, command=command)
    if as_json:
        print_json(results)
    else:
        show_results(results, output_dir)


def runner_of(output_dir: Path, measures: list[str], parallel: int) -> Runner:
    """Return the runner that trains the runs; several at a time share the machine's threads."""
    from ..compare.queue import ProcessRunner

    threads = None if parallel == 1 else max((os.cpu_count() or 1) // parallel, 1)
    return ProcessRunner(output_dir, measures, threads)


def _check_parallel(plan: SweepPlan, parallel: int) -> None:
    # "auto" takes the GPU where there is one. Two runs would share its memory, which the planner gives to each as a
    # whole.
    if parallel == 1 or all(run.recipe.machine.device == "cpu" for run in plan.runs):
        return
    from ..fit import this_machine

    if this_machine().is_gpu:
        raise UserInputError(
            f"--parallel: runs on one GPU go one at a time, got {parallel}. Omit it, or set machine.device=cpu."
        )


def _command(name: str, words: list[str], options: Mapping[str, object], as_list: bool) -> str:
    """Return the command that continues the sweep."""
    # The folder is always stated, so that the command continues this sweep and no other.
    defaults = {"--measure": "", "--parallel": 1, "--seeds": 3}
    stated = [str(part) for pair in options.items() if defaults.get(pair[0]) != pair[1] for part in pair]
    # Quoted, so that it can be pasted into a shell as it is printed.
    return shlex.join(["qlora-neft", "sweep", name, *words, *stated, *(["--list"] if as_list else [])])


def report(
    dirs: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of runs, or of sweeps for all their runs.")
    ],
    output: Annotated[
        Path, typer.Option(dir_okay=False, help="The page to write; a Markdown file of the same name goes beside it.")
    ] = Path("report.html"),
) -> None:
    """Compare runs on one page: settings, curves, measures, answers.

    The page needs no network and no JavaScript.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserInputError(f"--output: must end in .html, got {str(output)!r}.")
    check_parent(output)
    from ..compare.page import write_report

    pages = write_report(dirs, output)
    typer.echo("\n".join(f"written: {page}" for page in pages))
