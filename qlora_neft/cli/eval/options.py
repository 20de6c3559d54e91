"""Options and output that the verbs under eval share."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

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
    from ...display.quiet import quiet_libraries

    with contextlib.redirect_stdout(sys.stderr), quiet_libraries():
        yield


def say(line: str) -> None:
    """On stderr."""
    typer.echo(line, err=True)


def print_json(content: Any) -> None:
    """On standard output; what is no finite number as null."""
    from ...files.json_file import finite

    typer.echo(json.dumps(finite(content) if isinstance(content, dict) else content, indent=2))
