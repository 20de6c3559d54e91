"""The verb that looks at a run under way: watch."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOption, console, print_json


def watch(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a run, of its mirror, or of a sweep; on any machine.")
    ],
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit, as into a pipe.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two readings of the folder.")] = 2.0,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="Draw in ASCII.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Watch a run: losses, speed, time left, memory.

    Reads the run's folder and writes nothing there. Ends when the run is finished, or at Ctrl-C.
    """
    from ..run_folder.stop import StopNow
    from ..watch.watch import Watched, follow, look_of, picture, to_json

    screen, watched = console(), Watched(folder)
    if as_json:
        print_json(to_json(folder, watched.look()))
    elif once or not screen.is_terminal:
        screen.print(picture(folder, watched.look(), look_of(screen, ascii_only=ascii_only)))
    else:
        try:
            follow(watched, screen, interval, ascii_only=ascii_only)
        except KeyboardInterrupt as error:  # how one stops watching; any other signal ends the process as usual
            if isinstance(error, StopNow) and error.signal != signal.SIGINT:
                raise
