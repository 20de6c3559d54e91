"""What every section of a recipe is made of: the strict base class, types of values, and the error of a broken rule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Auto = Literal["auto"]
Text = Annotated[str, Field(min_length=1)]


# The order of keys in a section matters: a validator sees the values of earlier keys alone (``info.data``). A key that
# is not there broke a rule of its own, which is reported already.
class Section(BaseModel):
    """A section of a recipe: strictly typed, without unknown keys, immutable."""

    # Rules apply to defaults too: a key may be required by the value of another.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, protected_namespaces=())


def broken_rule(message: str, *, involves: tuple[str, ...] = (), key: str | None = None) -> PydanticCustomError:
    """Make the error that a validator raises.

    Args:
        message: The rule, the value got, the remedy.
        involves: Other keys that the rule looks at, since an override of one of them may be the cause: ``key`` of the
            same section, ``section.key``, or ``section.`` for all of a section.
        key: The key at fault, for a validator of a whole section.
    """
    # The message is passed as a value: pydantic would read braces in a template as names.
    return PydanticCustomError("rule", "{message}", {"message": message, "involves": involves, "key": key})
