"""Types of a recipe's values, and the error of a rule that looks at more than one of them."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ..files.suffixes import JINJA_SUFFIXES

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Auto = Literal["auto"]
Text = Annotated[str, Field(min_length=1)]

TEMPLATES = ("auto", "alpaca", "vicuna", "chat")


class Section(BaseModel):
    """A section of a recipe: strict types, no unknown keys, nothing changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, protected_namespaces=())


def broken_rule(message: str, *, involves: tuple[str, ...] = (), key: str | None = None) -> PydanticCustomError:
    """The error a validator raises.

    Args:
        message: The rule, the value got, the remedy.
        involves: Other keys the rule looks at, since an override of one may be the cause: ``key`` of the
            same section, or ``section.key``.
        key: Moves the error from the section it was found in to one key of that section.
    """
    # The text goes in as a value: as a template, its own braces would be read as names.
    return PydanticCustomError("rule", "{message}", {"message": message, "involves": involves, "key": key})


def template_name(value: str) -> str:
    """A prompt template: one of ours, or a Jinja file by its suffix."""
    if value in TEMPLATES or value.endswith(JINJA_SUFFIXES):
        return value
    close = difflib.get_close_matches(value, TEMPLATES, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise broken_rule(f"one of {', '.join(TEMPLATES)}, or a .jinja file, got the text {value!r}.{meant}")
