"""Sets of data as a user names them, and their losses side by side. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from .plain_table import short_names

RESERVED = ("train", "held out")


def named_sets(written: Sequence[str]) -> dict[str, str]:
    """``NAME=FILE`` or ``FILE`` as path by name; a file without a name is called after itself.

    Raises:
        UserInputError: If two sets have one name, or one is empty.
    """
    found: dict[str, str] = {}
    for text in written:
        name, path = text.split("=", 1) if "=" in text and not Path(text).exists() else (Path(text).stem, text)
        if not name or not path:
            raise UserInputError(f"--data: must be FILE or NAME=FILE, got {text!r}.")
        if name in found or name in RESERVED:
            raise UserInputError(f"--data: there is a set {name!r} already. Give it another name: NAME={path}.")
        found[name] = path
    return found


def loss_table(found: Sequence[dict[str, Any]], sources: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: a set a row, base and adapters in columns."""
    rows = []
    for entry in found:
        losses = [entry["base"], *(entry["adapters"].get(source) for source in sources)]
        counts = [f"{entry['rows']:,}", f"{entry['tokens']:,}"]
        rows.append([entry["set"], *counts, *("-" if loss is None else f"{loss:.4f}" for loss in losses)])
    return ["nats per trained token", "rows", "tokens", "base", *short_names(sources)], rows
