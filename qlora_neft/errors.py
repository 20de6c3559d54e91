"""The errors that end a command with a message instead of a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserInputError(ValueError):
    """What the user wrote is wrong: a recipe, an argument, a data file, a directory. Exit code 2.

    The message names what the caller wrote, the rule, the value got and the remedy.
    """


class RecipeError(UserInputError):
    """A recipe that cannot be used, with every problem found in it.

    Args:
        problems: One line per problem, ``path:line: section.key: rule, value got, remedy``.
        source: The file the problems are in; the heading of a list of several.

    Attributes:
        problems: The problems as given, in the order of the file.
    """

    def __init__(self, problems: Sequence[str] | str, source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        super().__init__(self._message())

    def _message(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        heading = f"{self.source or 'recipe'}: {len(self.problems)} problems"
        return "\n  ".join([heading, *self.problems])


class RunFailed(RuntimeError):
    """The input was right and the run failed all the same. Exit code 1."""


class RunInterrupted(Exception):
    """A signal asked a run to stop, and it did, with a checkpoint. Exit code 128 + signal.

    Attributes:
        signal: Its number.
    """

    def __init__(self, signal: int, message: str) -> None:
        self.signal = int(signal)
        super().__init__(message)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has none: a detail for our own message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
