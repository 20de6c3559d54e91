"""The verbs that compare runs: sweep and report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..display.terminal import echo
from ..errors import UserInputError
from .alpaca import JUDGES, ReferenceOption
from .options import (
    InstructionsOption,
    JsonOption,
    RecipeArgument,
    RowsOption,
    check_parent,
    complete_override,
    print_json,
)

if TYPE_CHECKING:
    from ..compare.asking import Asking
    from ..compare.decide import Decision
    from ..compare.plan import SweepPlan
    from ..compare.queue import Runner

PAPER_ALPHAS = "0,5,10,15"
PAPER_ANNOTATOR = "chatgpt_fn"  # "the best one on AlpacaEval using ChatGPT as the evaluator" (appendix)

WordsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=V1,V2,...",
        help="Keys to sweep with their values, such as neftune.noise_alpha=0,5,10,15; a key with one value is the "
        "same override in every run.",
        autocompletion=complete_override,
    ),
]


JudgeOption = Annotated[
    str | None,
    typer.Option(metavar=JUDGES, help="Who judges for --measure alpaca: the alpaca_eval package, or a local model."),
]


def sweep(
    name: RecipeArgument,
    words: WordsArgument = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for the runs and their results; default: sweep-NAME-KEYS."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs per setting; seeds count up from the recipe's. Default: 3.")
    ] = None,
    as_list: Annotated[
        bool,
        typer.Option("--list/--grid", help="Pair the values of several keys by position, or combine all of them."),
    ] = False,
    measure: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Measures to take after training, comma-separated; see docs/sweeps.md."),
    ] = "",
    rank_by: Annotated[
        str | None,
        typer.Option(metavar="MEASURE", help="What decides: held_out_loss (default), alpaca, or another measure."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="paper", help="NEFTune's: alpha 0, 5, 10, 15, one seed, the best win rate; a --judge is needed."
        ),
    ] = None,
    instructions: InstructionsOption = None,
    rows: RowsOption = 0,
    judge: JudgeOption = None,
    annotator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="Annotator of alpaca_eval; default: alpaca_eval_gpt4, paper: chatgpt_fn."
        ),
    ] = None,
    reference: ReferenceOption = None,
    parallel: Annotated[int, typer.Option(min=1, help="Number of runs at a time, on CPUs.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check model, data and plan of each run, and list them with their tokens.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe under several settings, and say which is best.

    Runs of one seed differ only in what is swept. Repeat the command to continue an interrupted sweep.
    """
    from ..compare.asking import Asking, check_asking
    from ..compare.decide import WIN_RATE, Decision, decision_by
    from ..compare.plan import check_measures
    from ..evaluation.alpaca.judges import ANNOTATOR

    given = list(words or [])
    words = list(given)
    measures = [word for word in (part.strip() for part in measure.split(",")) if word]
    decision = Decision() if rank_by is None else Decision(decision_by(rank_by))
    if protocol is not None:
        decision = _paper_protocol(protocol, words, seeds, rank_by)
        seeds, annotator = 1, annotator or PAPER_ANNOTATOR
    if decision.by == WIN_RATE and "alpaca" not in measures:
        measures.append("alpaca")
    seeds = seeds or 3
    # All checks of words come before the slow imports.
    check_measures(measures)
    asking = Asking(
        None if instructions is None else str(instructions),
        rows,
        judge,
        annotator or ANNOTATOR,
        None if reference is None else str(reference),
    )
    combine: Literal["grid", "list"] = "list" if as_list else "grid"
    # Every run's recipe is checked here: a wrong value is reported before the first run begins.
    plan, notes = _planned(name, words, seeds, combine, decision, measures, asking, output_dir)
    check_parallel(plan, parallel)
    notes += [f"note: {line}" for line in check_asking(asking, measures)]
    output_dir = output_dir or _default_folder(name, plan)
    # Heavier imports from here on.
    from ..compare.show import SweepDisplay, show_plan, show_results

    if dry_run:
        from ..compare.sweep import check_runs

        show_plan(check_runs(plan, output_dir, notes), as_json=as_json)
        return
    from ..compare.sweep import sweep as run_sweep

    with outliving_the_reader(output_dir), SweepDisplay(quiet=as_json) as display:
        runner = runner_of(output_dir, measures, parallel, asking)
        options = {
            "--seeds": None if protocol else seeds,
            "--output-dir": output_dir,
            "--measure": measure,
            "--rank-by": rank_by,
            "--protocol": protocol,
            "--instructions": instructions,
            "--rows": rows,
            "--judge": judge,
            "--annotator": annotator if annotator != PAPER_ANNOTATOR or not protocol else None,
            "--reference": reference,
            "--parallel": parallel,
        }
        results = run_sweep(
            plan,
            output_dir,
            runner,
            display,
            measures=measures,
            asking=asking,
            parallel=parallel,
            command=_command(name, given, options, as_list),
            notes=notes,
        )
    if as_json:
        print_json(results)
    else:
        show_results(results, output_dir)


@contextmanager
def outliving_the_reader(output_dir: Path) -> Generator[None, None, None]:
    """Train on when nobody reads the output any more, and note that in the sweep's folder."""
    from ..output import outliving_its_reader
    from ..run_folder.notes import RunNotes

    notes = RunNotes(output_dir)
    try:
        with outliving_its_reader(notes):
            yield
    finally:
        if output_dir.is_dir():  # not made for a note
            notes.open()


def _paper_protocol(protocol: str, words: list[str], seeds: int | None, rank_by: str | None) -> Decision:
    """Fill in what the paper's protocol sweeps, and return what decides in it."""
    from ..compare.decide import WIN_RATE, Decision

    if protocol != "paper":
        raise UserInputError(f"--protocol: must be paper, got {protocol!r}.")
    if seeds not in (None, 1) or rank_by is not None:
        stated = f"--seeds {seeds}" if seeds not in (None, 1) else f"--rank-by {rank_by}"
        raise UserInputError(
            f"--protocol paper: is one seed each and the best win rate. Omit {stated}, or the protocol."
        )
    if any(word.partition("=")[0] == "neftune.noise_alpha" for word in words):
        raise UserInputError("--protocol paper: is alpha 0, 5, 10 and 15. Omit neftune.noise_alpha, or the protocol.")
    words.insert(0, f"neftune.noise_alpha={PAPER_ALPHAS}")
    return Decision(WIN_RATE, "highest")


def _planned(
    name: str,
    words: list[str],
    seeds: int,
    combine: Literal["grid", "list"],
    decision: Decision,
    measures: list[str],
    asking: Asking,
    output_dir: Path | None,
) -> tuple[SweepPlan, list[str]]:
    """Plan a sweep; hold out a share of the rows where they are needed and the recipe holds out none.

    Returns:
        The plan, and lines that say what will decide.
    """
    from ..compare.folder import began_without_held_out
    from ..compare.plan import HELD_OUT_SHARE, check_held_out, names_held_out, needs_held_out, plan_sweep

    options = {"seeds": seeds, "combine": combine, "decision": decision}
    plan = plan_sweep(name, words, **options)
    needed = needs_held_out(measures, decision, asks_them=asking.is_on_held_out_rows)
    notes = [f"decides: {decision.sentence(seeds)}"]
    if needed and not plan.holds_out:
        why = None
        if names_held_out(words):
            why = "the command says so"
        elif began_without_held_out(output_dir or _default_folder(name, plan)):
            why = "this sweep began without"
        elif any(run.recipe.data.has_eval_rows for run in plan.runs):
            why = "some runs have them, some not"
        if why is None:
            plan = plan_sweep(name, [*words, f"data.eval_fraction={HELD_OUT_SHARE}"], **options)
            notes.append(
                f"held out: {HELD_OUT_SHARE:.0%} of the rows (data.eval_fraction={HELD_OUT_SHARE}), as the recipe has "
                "none: the same rows in every run, trained on in none"
            )
        elif decision.is_on_held_out_rows:
            notes = [f"decides: nothing, as there are no held-out rows ({why}). Give data.eval_fraction, or --rank-by."]
    check_held_out(measures, plan, asks_them=asking.is_on_held_out_rows)
    return plan, notes


def _default_folder(name: str, plan: SweepPlan) -> Path:
    return Path("-".join(["sweep", Path(name).stem, *(key.split(".")[-1] for key in plan.keys)]))


def runner_of(output_dir: Path, measures: list[str], parallel: int, asking: Asking | None = None) -> Runner:
    """Return the runner that trains the runs; several at a time share the machine's threads."""
    from ..compare.asking import Asking
    from ..compare.queue import ProcessRunner

    threads = None if parallel == 1 else max((os.cpu_count() or 1) // parallel, 1)
    return ProcessRunner(output_dir, measures, threads, asking or Asking())


def check_parallel(plan: SweepPlan, parallel: int) -> None:
    """Refuse several runs at a time on one GPU."""
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
    defaults = {"--measure": "", "--parallel": 1, "--seeds": 3, "--rows": 0}
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
    echo("\n".join(f"written: {page}" for page in pages))
