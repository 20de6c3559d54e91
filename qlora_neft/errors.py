"""The errors that end a command with a message instead of a traceback."""

from __future__ import annotations

import re
import signal as signals
from collections.abc import Sequence
from typing import Any, Self


class UserInputError(ValueError):
    """Something the user wrote is wrong: a recipe, an argument, a data file, a directory. Exit code 2.

    The message names what the caller wrote, the rule, the value got and the remedy.
    """


class RecipeError(UserInputError):
    """A recipe cannot be used; the error carries every problem found in it.

    Args:
        problems: One line per problem, ``path:line: section.key: rule, value got, remedy``.
        source: The file that the problems are in, which heads a list of several.

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
    """A run failed although the input was right. Exit code 1."""


class Diverged(RunFailed):
    """Training left the range of numbers: its loss or gradient stayed NaN or infinite."""


class RunInterrupted(Exception):
    """A command stopped, and keeps what it has done, because a signal asked it to. Exit code 128 + signal.

    Attributes:
        signal: The signal's number.
    """

    def __init__(self, signal: int, message: str) -> None:
        self.signal = int(signal)
        super().__init__(message)

    @classmethod
    def by(cls, stop: KeyboardInterrupt, message: str) -> Self:
        """Return the error for an exception that a signal raised: Ctrl-C's own, unless it says which."""
        return cls(getattr(stop, "signal", signals.SIGINT), message)


# A message begins with what the caller wrote, or with where it stands: ``mine.yaml:7: lora.r: ...``, ``override
# lora.r=0: lora.r: ...``, ``override lora.rank=8: ...``.
_PLACED = re.compile(
    r"(?:(?P<place>\S+:\d+|override (?P<override>[^\s=:]+)\S*): )?(?:(?P<key>[^\s:]+): )?(?P<said>.*)", re.DOTALL
)
_SENTENCE = re.compile(r"(?<=[.?])\s+(?=[A-Z])")


def problem_of(line: str) -> dict[str, str | None]:
    """Take a message to the user apart, for programs.

    Args:
        line: A message as `UserInputError` states them: what the caller wrote, the rule and the value got, the remedy.

    Returns:
        ``message``, whole; ``place``, file and line or the override, ``key``, what the caller wrote, and ``remedy``,
        the sentences after the first: each None if the message has no such part.
    """
    found = _PLACED.fullmatch(line)
    assert found is not None  # every part may be missing
    sentences = _SENTENCE.split(found["said"].strip(), maxsplit=1)
    return {
        "place": found["place"],
        "key": found["key"] or found["override"],
        "message": line,
        "remedy": sentences[1] if len(sentences) > 1 else None,
    }


def as_record(error: Exception, code: int) -> dict[str, Any]:
    """Return an error that ends a command as plain values, as ``--json`` prints it.

    Args:
        error: One of the errors above.
        code: The command's exit code.
    """
    problems = getattr(error, "problems", None) or [str(error)]
    return error_record(code, str(error), [problem_of(line) for line in problems])


def error_record(code: int, message: str, problems: Sequence[dict[str, str | None]]) -> dict[str, Any]:
    """Return what ``--json`` prints instead of a result; ``problems`` have the keys of `problem_of`."""
    return {"error": {"code": code, "message": message, "problems": list(problems)}}


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has none: a detail for our own message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
