"""Shared by the measures of finished runs: the folders they take, and where they are computed. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapter.folder import AdapterFolder, find_adapter
from ..errors import UserInputError

TRAIN, HELD_OUT = "train", "held out"  # names of a run's own sets of rows

Say = Callable[[str], None]
Progress = Callable[[int, int], None]  # how many are done, of how many


@dataclass(frozen=True)
class Machine:
    """Where and how a measure is computed; apart from rounding, none of it changes the result.

    Attributes:
        device, precision, base: As in `load_trained`.
        batch_size: Sequences at a time.
    """

    device: str = "auto"
    precision: str = "auto"
    base: str | None = None
    batch_size: int = 8


def folders_of(sources: Sequence[str], machine: Machine) -> list[AdapterFolder]:
    """Find every adapter before the first is loaded.

    Raises:
        UserInputError: If one cannot be found, or is named twice.
    """
    if len(set(sources)) < len(sources):
        raise UserInputError("DIR: a folder is named twice. Name each once.")
    # All of them first: a typo in the last name should not cost the hours that the others take.
    return [find_adapter(source, base=machine.base) for source in sources]


def named_sets(written: Sequence[str]) -> dict[str, str]:
    """Read ``NAME=FILE`` or ``FILE`` as paths by name; a file without a name is called after itself.

    Raises:
        UserInputError: If two sets have the same name, or a name or path is empty.
    """
    found: dict[str, str] = {}
    for text in written:
        # A file whose own name holds an equals sign is a file.
        name, path = text.split("=", 1) if "=" in text and not Path(text).exists() else (Path(text).stem, text)
        if not name or not path:
            raise UserInputError(f"--data: must be FILE or NAME=FILE, got {text!r}.")
        if name in found or name in (TRAIN, HELD_OUT):
            raise UserInputError(f"--data: there is already a set {name!r}. Give this one another name: NAME={path}.")
        found[name] = path
    return found


def progress_of(say: Say, what: str) -> Progress:
    """Return a function that says how many of something are done."""
    return lambda done, total: say(f"{what} {done:,} of {total:,}")


def no_progress(done: int, total: int) -> None:
    """Say nothing."""
