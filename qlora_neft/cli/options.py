"""Options and output that the verbs under eval share."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserInputError

if TYPE_CHECKING:
    from ..generation.decode import Decoding

RunsArgument = Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders of finished runs, or adapters.")]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where it is computed.")]
PrecisionOption = Annotated[str, typer.Option(metavar="auto|bf16|fp16|fp32", help="Number format.")]
BaseOption = Annotated[str | None, typer.Option(help="Base model in place of the recorded one.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Sequences at a time.")]
RowsOption = Annotated[int, typer.Option(min=0, help="The first so many; 0: all.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the run's recipe, such as data.path where it has moved."),
]
InstructionsOption = Annotated[
    Path | None, typer.Option(help="JSON of objects with an instruction; default: AlpacaEval's 805, from the Hub.")
]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Whatever libraries print, standard output holds the result alone."""
    from ..display.console import quiet_libraries

    with contextlib.redirect_stdout(sys.stderr), quiet_libraries():
        yield


def say(line: str) -> None:
    """On stderr."""
    typer.echo(line, err=True)


def print_json(content: Any) -> None:
    """On standard output; what is no finite number as null."""
    from ..files import finite

    typer.echo(json.dumps(finite(content) if isinstance(content, dict) else content, indent=2))


# NEFTune's authors: greedy, with a repetition penalty of 1.2 in all experiments, also where they sampled
# (arXiv:2310.05914, section 5.2, footnote, and appendix, "Additional Ablation Studies").
REPETITION_PENALTY = 1.2

TokensOption = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
LeastTokensOption = Annotated[int, typer.Option(min=0, help="An answer does not end before this many; 0: it may.")]
PenaltyOption = Annotated[float, typer.Option(help="Against repetition; 1 is none. NEFTune's authors use 1.2.")]
SampleOption = Annotated[bool, typer.Option("--sample", help="Draw tokens; else the likeliest is taken.")]
TemperatureOption = Annotated[float | None, typer.Option(help="With --sample; default 1.")]
TopPOption = Annotated[float | None, typer.Option(help="With --sample; default 1 (all).")]
TopKOption = Annotated[int | None, typer.Option(help="With --sample; default 0 (all).")]
SeedOption = Annotated[int | None, typer.Option(help="With --sample; default 0.")]


def decoding_of(
    max_new_tokens: int, min_new_tokens: int, repetition_penalty: float, *, sample: bool, **drawing: float | None
) -> Decoding:
    """What the options ask for.

    Args:
        max_new_tokens, min_new_tokens, repetition_penalty: As in `Decoding`.
        sample: ``do_sample``.
        drawing: ``temperature``, ``top_p``, ``top_k`` and ``seed``; None where the option was not given.

    Raises:
        UserInputError: If a value makes no sense, or has no effect.
    """
    given = {name: value for name, value in drawing.items() if value is not None}
    if given and not sample:
        unused = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserInputError(f"{unused}: no effect without --sample. Add it, or leave this out.")
    from ..generation.decode import Decoding

    try:
        return Decoding(
            max_new_tokens, min_new_tokens, do_sample=sample, repetition_penalty=repetition_penalty, **given
        )
    except UserInputError as error:  # the option as it was written
        name, rule = str(error).split(":", 1)
        raise UserInputError(f"--{name.replace('_', '-')}:{rule}") from error


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes, for the shell."""
    from ..recipe.load import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


def complete_override(incomplete: str) -> list[str]:
    """Keys of a recipe with an equals sign, for the shell."""
    from ..recipe.keys import key_names

    return [f"{key}=" for key in key_names() if key.startswith(incomplete)]


def complete_recipe_or_override(incomplete: str) -> list[str]:
    """Names of recipes, then keys, for the shell."""
    return complete_recipe(incomplete) + complete_override(incomplete)


RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A recipe's name, or a path to a YAML file.", autocompletion=complete_recipe),
]


OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the recipe, such as lora.r=8; all keys: qlora-neft show --keys.",
        autocompletion=complete_override,
    ),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")]
