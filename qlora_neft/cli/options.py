"""Arguments and options that several verbs share, each declared once, and how verbs print. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..display.terminal import echo
from ..errors import UserInputError, error_record
from ..imports import imports_that_stay

if TYPE_CHECKING:
    from rich.console import Console

    from ..generation.decode import Decoding

# ---- Completion in the shell ----


def complete_recipe(incomplete: str) -> list[str]:
    """Complete names of shipped recipes."""
    from ..recipe.load import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


def complete_override(incomplete: str) -> list[str]:
    """Complete a recipe's keys, each with its equals sign."""
    from ..recipe.keys import key_names
    from ..recipe.load import recipe_dir
    from ..recipe.override_files import list_override_files

    # Imported here, as in every completion: the shell starts this program at each press of the tab key.
    words = [f"{key}=" for key in key_names()] + [f"@{name}" for name in list_override_files(recipe_dir())]
    return [word for word in words if word.startswith(incomplete)]


def complete_recipe_or_override(incomplete: str) -> list[str]:
    """Complete names of recipes, then keys."""
    return complete_recipe(incomplete) + complete_override(incomplete)


# ---- Arguments and options ----

_PATHS = re.compile("DIR|FILE|FOLDER|OUT|BASE")  # in what --help calls a value that is, or may be, a path


class Verb(TyperCommand):
    """A verb whose paths may begin with ``~``, which no shell expands in ``--output=~/answers.json``."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the options."""
        command = f"{parent.command_path} {info_name}" if parent else info_name
        with usage_errors_in_json(list(args), f"{command} --help"):  # a copy, as parsing consumes the list
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        for param in self.params:
            if param.name is not None and (value := ctx.params.get(param.name)):
                is_path = bool(_PATHS.search(param.metavar or ""))
                ctx.params[param.name] = _at_home(value, is_path=is_path)
        return super().invoke(ctx)


class Group(TyperGroup):
    """A group of verbs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb."""
        with usage_errors_in_json(args, f"{ctx.command_path} --help"):
            return super().resolve_command(ctx, args)


def _at_home(value: Any, *, is_path: bool) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_at_home(one, is_path=is_path) for one in value)
    if isinstance(value, Path):
        return value.expanduser()
    return os.path.expanduser(value) if is_path and isinstance(value, str) else value


RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A recipe's name, or the path to a YAML file.", autocompletion=complete_recipe),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides of the recipe, such as lora.r=8, or @FILE with one a line. All keys: qlora-neft show --keys.",
        autocompletion=complete_override,
    ),
]
AdapterArgument = Annotated[
    str,
    typer.Argument(
        metavar="DIR", help="An adapter: the --output-dir of a run, a checkpoint, any LoRA folder, or a Hub id."
    ),
]
AnsweringArgument = Annotated[
    str,
    typer.Argument(metavar="DIR|MODEL", help="An adapter, as elsewhere; or an untuned model, a folder or a Hub id."),
]
RunsArgument = Annotated[
    list[str], typer.Argument(metavar="DIR...", help="Adapters: folders of finished runs, or Hub ids.")
]

# Whether JSON is wanted and not printed yet: an error is then printed as JSON too (`app`). Not in click's context, of
# which some versions of Typer carry a copy, so that neither could be imported for all of them.
json_is_due: ContextVar[bool] = ContextVar("json_is_due", default=False)


def _remember_json(value: bool) -> bool:
    json_is_due.set(value)
    return value


JsonOption = Annotated[bool, typer.Option("--json", callback=_remember_json, help="Print JSON.")]
PictureOption = Annotated[Path | None, typer.Option(dir_okay=False, help="Also draw the result to this PNG file.")]

DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Device to compute on.")]
PrecisionOption = Annotated[str, typer.Option(metavar="auto|bf16|fp16|fp32", help="Number format to compute in.")]
BaseOption = Annotated[
    str | None, typer.Option(metavar="BASE", help="Use this base model instead of the recorded one.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of DIR on the Hub.")]

RowsOption = Annotated[int, typer.Option(min=0, help="Use only the first N rows (0: all).")]
BatchOption = Annotated[int, typer.Option(min=1, help="Number of sequences to compute at a time.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override the run's recipe, such as data.path if the data moved."),
]
InstructionsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE|held-out",
        help="JSON list of objects with an instruction, or a run's held-out prompts; default: AlpacaEval's 805.",
    ),
]

# ---- Options of decoding ----

TokensOption = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")]
LeastTokensOption = Annotated[int, typer.Option(min=0, help="Minimum number of new tokens.")]
PenaltyOption = Annotated[float, typer.Option(help="Repetition penalty; 1 is none, NEFTune's authors use 1.2.")]
SampleOption = Annotated[bool, typer.Option("--sample", help="Sample tokens instead of always taking the likeliest.")]
TemperatureOption = Annotated[float | None, typer.Option(help="Sampling temperature; default 1. Needs --sample.")]
TopPOption = Annotated[
    float | None, typer.Option(help="Sample from the likeliest tokens of this total probability; default 1 (all).")
]
TopKOption = Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens; default 0 (all).")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the sampling; default 0.")]


def decoding_of(
    max_new_tokens: int, min_new_tokens: int, repetition_penalty: float, *, sample: bool, **drawing: float | None
) -> Decoding:
    """Return the decoding that the options ask for.

    Args:
        max_new_tokens, min_new_tokens, repetition_penalty: As in `Decoding`.
        sample: ``do_sample``.
        drawing: ``temperature``, ``top_p``, ``top_k`` and ``seed``; None for an option that was not given.

    Raises:
        UserInputError: If a value is out of range, or has no effect.
    """
    # Only what was given, so that the defaults of `Decoding` are stated once, there.
    given: dict[str, Any] = {name: value for name, value in drawing.items() if value is not None}
    if given and not sample:
        # Refused rather than ignored: an answer without the temperature that was asked for looks like one with it.
        unused = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserInputError(f"{unused}: no effect without --sample. Add it, or omit {unused}.")
    with imports_that_stay():
        from ..generation.decode import Decoding

    try:
        return Decoding(
            max_new_tokens, min_new_tokens, do_sample=sample, repetition_penalty=repetition_penalty, **given
        )
    except UserInputError as error:  # it names the field; say the option that the user wrote
        # Messages of `Decoding` start with the field's name.
        name, rule = str(error).split(":", 1)
        raise UserInputError(f"--{name.replace('_', '-')}:{rule}") from error


def check_device(device: str) -> None:
    """Refuse a device that does not exist before anything slow is imported."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserInputError(f"--device: must be auto, cpu or cuda, got {device!r}.")


def check_parent(path: Path) -> None:
    """Refuse an ``--output`` whose folder is not there or is read-only, before the work that would be written there."""
    if not path.parent.is_dir():
        raise UserInputError(f"--output: there is no folder {str(path.parent)!r}. Create it first.")
    from ..disks import check_writable

    check_writable(path, "--output")


# ---- Output ----


@contextlib.contextmanager
def json_only(as_json: bool = True) -> Generator[None, None, None]:
    """Send whatever libraries print to stderr, so that with ``--json`` stdout holds the JSON alone."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def quiet() -> Generator[None, None, None]:
    """Keep stdout for the result, and silence the libraries' progress bars and notes."""
    with imports_that_stay():
        from ..display.console import quiet_libraries

    with json_only(), quiet_libraries():
        yield


@contextlib.contextmanager
def usage_errors_in_json(words: Sequence[str], command: str) -> Generator[None, None, None]:
    """Print an error in the command line itself as JSON too, if ``--json`` is among its words.

    Args:
        words: Of the command line.
        command: What to run instead, for the remedy.
    """
    try:
        yield
    except Exception as error:
        # click's UsageError, of which some versions of Typer carry a copy: neither can be named for all of them.
        said = getattr(error, "format_message", None)
        if "--json" in words and said is not None:
            names = getattr(getattr(error, "param", None), "opts", None) or [getattr(error, "option_name", None)]
            problem = {"place": None, "key": names[-1], "message": said(), "remedy": f"See {command}."}
            print_json(error_record(2, said(), [problem]))
        raise


def say(*lines: str) -> None:
    """Print progress and notes to stderr; stdout is for the result."""
    for line in lines:
        echo(line, err=True)


def print_json(content: Any) -> None:
    """Print indented JSON to stdout; NaN and infinity, for which JSON has no word, become null."""
    from ..files import finite

    json_is_due.set(False)
    echo(json.dumps(finite(content) if isinstance(content, dict) else content, indent=2))


def console(*, stderr: bool = False, highlight: bool = False) -> Console:
    """Return a console that prints text, also in a notebook, where rich would show HTML beside the captured output."""
    from ..display.safe_console import SafeConsole

    return SafeConsole(stderr=stderr, highlight=highlight, force_jupyter=False)


def draw_or_refuse(draw: Callable[[], bool], path: Path) -> None:
    """Draw the file of ``--picture``.

    Args:
        draw: Writes the file; False if matplotlib is missing.
        path: The file.

    Raises:
        UserInputError: If it cannot be written, or matplotlib is missing.
    """
    try:
        is_drawn = draw()
    except (OSError, ValueError) as error:
        raise UserInputError(f"--picture: {str(path)!r} cannot be written ({error}). Give a .png file.") from error
    if not is_drawn:
        raise UserInputError("--picture: matplotlib is missing. Install the extra: pip install 'qlora-neft[plots]'")
    say(f"written: {path}")
