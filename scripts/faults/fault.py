"""What a fault is, and what is written down of it. A module of faults exports ``FAULTS``, a sequence of `Fault`.

`__main__.MODULES` names the modules; their order, and that of the faults in each, is the order of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bench import Bench


class NotHeld(AssertionError):
    """A promise was broken; the message says how."""


class NotTried(Exception):
    """A fault that cannot be tried here; the message says why."""


def hold(condition: object, message: str) -> None:
    """Require what is promised.

    Raises:
        NotHeld: If it is not so.
    """
    if not condition:
        raise NotHeld(message)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: Its class, which is a row of the table.
        name: What exactly is done; unique within the class.
        check: Does it, lets the same command go on, and checks the promises, with `hold`. Returns what was lost: the
            optimizer steps that had to be taken again, 0 where none is at stake.
    """

    kind: str
    name: str
    check: Callable[[Bench], int]


@dataclass
class Result:
    """What came of a fault: a row of ``faults.json``.

    Attributes:
        kind, name: As in `Fault`.
        held: Whether every promise was kept; None if it could not be tried here.
        lost: Optimizer steps taken again.
        note: What broke, or why it was not tried.
        seconds: How long it took.
    """

    kind: str
    name: str
    held: bool | None
    lost: int = 0
    note: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)
