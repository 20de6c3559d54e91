"""Values of a row: checked to be what a format says, made the same from every kind of file, and shown in messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .examples import BadRow

# Whole floats up to here are exact, and so the same number as an integer.
EXACT = 2**53


def text_of(value: Any, name: str) -> str:
    """Return a value that must be text.

    Raises:
        BadRow: If it is none, or no tokenizer accepts it; the message begins with ``name``.
    """
    if not isinstance(value, str):
        raise BadRow(f"{name} is {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer accepts
        raise BadRow(f"{name} is {shown(value)}, with half of a surrogate pair") from error
    return value


def from_json(text: str, name: str, verb: str = "is") -> Any:
    """Return the value that a JSON text states.

    Raises:
        BadRow: If it is not JSON; the message begins with ``name`` and ``verb``.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # too many digits in a number give a ValueError
        # What pandas writes for a list in a table's cell.
        hint = ", but Python's spelling of a list; write it with json.dumps" if text.startswith(("[{'", "{'")) else ""
        raise BadRow(f"{name} {verb} text that is not JSON{hint}") from error


def normal(value: Any, first: Sequence[str] = ()) -> Any:
    """Return a value as it is in every kind of file.

    In an Arrow table all rows of a column share one structure: fields that a row does not have are null, their order is
    that of the first row which has them, and whole numbers beside fractions are floats. A row of JSON could say more,
    and then the same rows would give other tokens. So null fields are absent, keys are sorted, and 1.0 is 1.

    Args:
        value: A value of JSON.
        first: Keys of the outermost object that come first, in this order.
    """
    if isinstance(value, Mapping):
        kept = [name for name, inner in value.items() if inner is not None]
        return {name: normal(value[name]) for name in in_order(kept, first)}
    if isinstance(value, list | tuple):
        return [normal(inner) for inner in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT:
        return int(value)
    return value


def in_order(names: Iterable[str], first: Sequence[str] = ()) -> list[str]:
    """Sort names, those of ``first`` before the others and in its order."""
    place = {name: number for number, name in reversed([*enumerate(first)])}
    return sorted(names, key=lambda name: (place.get(name, len(first)), str(name)))


def is_blank(value: Any) -> bool:
    """Tell whether a value says nothing: null, an empty or blank text, an empty list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, ())


def shown(value: Any) -> str:
    """Return a value's type and beginning, for messages."""
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
