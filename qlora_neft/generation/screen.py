"""The screen of a chat: answers as they grow, one after the other, or two in columns on a wide terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..display.terminal import shown

WIDE = 100  # columns that a terminal needs for two answers side by side
PROMPT = "> "
Write = Callable[[str], None]
Begin = Callable[[str], Write]  # begins the answer of a name


class Screen:
    """A terminal or a pipe.

    Args:
        console: A console on standard output.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    @property
    def is_typed_to(self) -> bool:
        """Whether the input comes from a keyboard."""
        return sys.stdin.isatty()

    def read(self) -> str | None:
        """Return the next line of input, None at its end.

        A line from a pipe is shown behind the prompt, so that the output is a complete transcript.

        Raises:
            KeyboardInterrupt: On Ctrl-C.
        """
        if self.is_typed_to:
            try:
                return input(PROMPT)
            except EOFError:
                self.console.print()
                return None
        line = sys.stdin.readline()
        if not line:
            return None
        line = line.removesuffix("\n")
        self.say(PROMPT + line)
        return line

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line of the program's own."""
        self.console.print(Text(self._shown(text)), style=style, soft_wrap=True, highlight=False)

    def write(self, text: str) -> None:
        """Write a piece of an answer; on a terminal, control characters are escaped."""
        self.console.file.write(self._shown(text))
        self.console.file.flush()

    @contextmanager
    def answers(self, names: Sequence[str]) -> Generator[Begin, None, None]:
        """Show an answer from each name; gives a function that begins one and returns a function to write it."""
        if len(names) == 1:
            yield lambda _: self.write
            self.write("\n")
        elif self.console.is_terminal and self.console.width >= WIDE:
            with self._columns(names) as begin:
                yield begin
        else:

            def begin(name: str) -> Write:
                if name != names[0]:
                    self.write("\n")
                self.say(f"{name}:", style="bold")
                return self.write

            yield begin
            self.write("\n")

    @contextmanager
    def _columns(self, names: Sequence[str]) -> Generator[Begin, None, None]:
        texts = {name: Text() for name in names}
        table = Table(*names, box=None, padding=(0, 2), expand=True)
        for column in table.columns:
            # Equal widths from the start; otherwise columns would shift as answers grow.
            column.ratio = 1
        # The table holds the Text objects themselves: appending to one redraws its column.
        table.add_row(*texts.values())
        with Live(table, console=self.console, refresh_per_second=12) as live:

            def begin(name: str) -> Write:
                def write(text: str) -> None:
                    texts[name].append(self._shown(text))

                return write

            yield begin
            # The last piece may have come since the last of the regular refreshes.
            live.refresh()

    def _shown(self, text: str) -> str:
        if not self.console.is_terminal:
            return text
        # A model may answer with escape sequences, which a terminal would obey.
        return shown(text).replace("\t", "    ")
