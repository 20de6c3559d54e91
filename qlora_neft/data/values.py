"""Values of a row: checked to be what a format says, and shown in messages where they are not."""

from __future__ import annotations

from typing import Any

from .examples import BadRow


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


def shown(value: Any) -> str:
    """Return a value's type and beginning, for messages."""
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
