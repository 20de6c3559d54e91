"""How far the preparation of data is."""

from __future__ import annotations

from rich.console import Console


class RowsProgress:
    """Counts rows while data is prepared; on a terminal only, since a pipe gets the result in a moment.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console, self.rows = console, 0

    def __call__(self, rows: int) -> None:
        """So many rows more."""
        self.rows += rows
        if self.console.is_terminal:
            self.console.print(f"preparing data: {self.rows:,} rows", end="\r")
