"""The verb report: runs beside each other, as one HTML page and a Markdown file. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserInputError


def report(
    dirs: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of runs; a sweep's folder stands for its runs.")
    ],
    output: Annotated[
        Path, typer.Option(dir_okay=False, help="The page; a Markdown file of the same name goes beside it.")
    ] = Path("report.html"),
) -> None:
    """Compare runs on one page: settings, curves, measures, answers.

    The page needs no network and no JavaScript.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserInputError(f"--output: must end in .html, got {str(output)!r}.")
    if not output.parent.is_dir():
        raise UserInputError(f"--output: there is no folder {str(output.parent)!r}. Make it first.")
    from ..run_report.page import write_report

    pages = write_report(dirs, output)
    typer.echo("\n".join(f"written: {page}" for page in pages))
