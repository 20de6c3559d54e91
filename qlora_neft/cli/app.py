"""The command line's root: every verb in the order of ``--help``, and errors as messages and exit codes.

Heavy imports stand inside the verb that needs them, so that ``--help`` and the verbs that only read answer at once.

Exit codes: 0 done, 1 the run failed, 2 the user's input is wrong, 128 + signal interrupted.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..display.terminal import echo
from ..errors import RunFailed, RunInterrupted, UserInputError, as_record
from ..output import ending_with_its_reader
from ..processes import end_with_starter
from ..run_folder.stop import StopNow, StopRequest, answered
from . import compare, evaluate, generate, look, publish, recipes, tune, watch
from .options import Group, JsonOption, OverridesArgument, RecipeArgument, Verb, json_is_due, json_only, print_json


# In the group rather than in `main`, so that Typer's test runner sees the same messages and exit codes.
class _Verbs(Group):
    """Turns the errors meant for the user into one message and an exit code.

    Any other exception is a bug of ours and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserInputError as error:
            raise _ended(error, "error", 2) from error
        except RunFailed as error:
            raise _ended(error, "failed", 1) from error
        except RunInterrupted as error:
            raise _ended(error, "interrupted", 128 + error.signal) from error
        except KeyboardInterrupt as error:
            # 128 + the signal's number, as a shell counts.
            number = error.signal if isinstance(error, StopNow) else signal.SIGINT
            raise _exit("interrupted", 128 + number) from error
        except Exception as error:
            from ..disks import told_of_disk

            failure = told_of_disk(error)
            if failure is None:
                raise
            is_users = isinstance(failure, UserInputError)
            raise _ended(failure, "error" if is_users else "failed", 2 if is_users else 1) from error


def _ended(error: Exception, how: str, code: int) -> typer.Exit:
    # Some verbs say in their own JSON what is wrong (`validate`, `preview`): stdout holds one document.
    if json_is_due.get():
        print_json(as_record(error, code))
    return _exit(f"{how}: {error}", code)


def _exit(message: str, code: int) -> typer.Exit:
    echo(message, err=True)
    return typer.Exit(code)


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

    # The two options are overrides of the recipe, so they are checked and recorded like any other.
    pushing = {"machine.push_to": push_to, "machine.push_every": push_every}
    pushed = [f"{key}={value}" for key, value in pushing.items() if value is not None]
    recipe = load_recipe(name, [*(overrides or ()), *pushed])  # before the slow imports: a typo is reported at once
    try:
        # Everything torch needs lives as long as this process: the garbage collector is spared from walking it.
        with imports_that_stay():
            from ..runner.run import run
    except StopNow as error:
        from ..run_folder.resume import stopped_early

        raise RunInterrupted(error.signal, stopped_early(output_dir)) from error

    # With --json, stdout holds the summary alone.
    with json_only(as_json):
        summary = run(recipe, output_dir, resume=resume, dry_run=dry_run, quiet=as_json)
    if as_json:
        print_json(summary)


app = typer.Typer(
    name="qlora-neft",
    cls=_Verbs,
    help="Fine-tune a 4-bit base with LoRA and NEFTune noise as published. Start with: qlora-neft ls",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes and colors would cost a third of the time --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order of --help: look at recipes, train, use, hand over, compare.
for verb in (
    *(recipes.ls, recipes.show, recipes.diff, recipes.cp, recipes.validate, recipes.schema),
    *(tune.tune, train, watch.watch, look.preview, look.fit, look.noise),
    *(generate.generate, generate.chat),
    *(publish.merge, publish.check, publish.gguf, publish.export),
    *(compare.sweep, compare.report),
):
    app.command(cls=Verb)(verb)
# A group: Typer lists it after all single verbs.
app.add_typer(evaluate.app)
app.command(cls=Verb)(look.doctor)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from .. import __version__

        echo(f"qlora-neft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, and exit.

    Args:
        arguments: Its words; None for those of this process.
    """
    # On some CPUs bitsandbytes logs on import that an optional kernel package is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Not app(...), which would also replace the interpreter's excepthook, of a notebook's kernel too.
    run = typer.main.get_command(app)
    end_with_starter()
    try:
        # Every signal that would end the process without a word; a verb that has something to save holds them.
        with ending_with_its_reader(), answered(StopRequest(grace_seconds=0, interrupts=True)):
            run(arguments) if arguments is None else run(list(arguments), prog_name="python -m qlora_neft")
    except RunFailed as error:  # standard output, as it was emptied at the end
        sys.exit(f"failed: {error}")
    sys.exit()
