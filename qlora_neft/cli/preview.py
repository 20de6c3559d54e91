"""The verb preview: on a screen, as JSON, into a folder. Heavy imports, so imported by the verb alone."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import typer
from rich.console import Console

from ..data import DataRefused
from ..display.rows_progress import RowsProgress
from ..errors import UserInputError
from ..inspection.preview import Preview, preview, render, save, to_json
from ..recipe import Recipe


def show(recipe: Recipe, *, rows: int, tokens: bool, output_dir: Path | None, as_json: bool) -> None:
    """Print the preview of a recipe; problems end with exit code 2, after all that can be shown."""
    found = _found(recipe, rows, as_json)
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=2))
    elif found.report["rows"]:
        render(found, Console(highlight=False), show_tokens=tokens)
    if output_dir is not None:
        for path in save(found, output_dir):
            typer.echo(f"written: {path}", err=True)
    if found.report["problems"]:
        raise DataRefused(found.report["problems"], found.report)


def _found(recipe: Recipe, rows: int, as_json: bool) -> Preview:
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            return preview(recipe, rows, None if as_json else RowsProgress(Console(stderr=True)))
    except UserInputError as error:
        if as_json:  # a program finds the problem where it finds all others
            empty = {"rows": 0, "tokens": 0, "trained_tokens": 0, "truncated": 0, "problems": [str(error)]}
            typer.echo(json.dumps(empty, indent=2))
        raise
