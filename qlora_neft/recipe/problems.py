"""Turn the errors that pydantic finds in a recipe into lines to act on: place, key, rule, value got, remedy."""

from __future__ import annotations

import difflib
import math
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from .keys import describe_type, fields_of, item_fields, unknown_key
from .yaml_text import RecipeText

Place = tuple[str, ...]


def describe_problems(
    error: ValidationError, values: dict[str, Any], written: RecipeText, overrides: dict[Place, str]
) -> list[str]:
    """Describe every key that breaks a rule, in one line each.

    Args:
        error: What pydantic raised.
        values: The values it was given.
        written: The file that they come from, with the line of every key.
        overrides: The override that set each key, by place; the other keys are the file's.

    Returns:
        The lines of problems in the file, in the file's order, then those of overrides.
    """
    # The first error of each key, with a number to sort by.
    found: dict[tuple[Place, str], tuple[int, str]] = {}
    for details in error.errors():
        context = details.get("ctx", {})
        # A key of several possible types fails once for each: one line says what it may be.
        place = tuple(str(part) for part in details["loc"][:2])
        if context.get("key"):
            # A validator of a whole section names the key at fault itself.
            place = (place[0], context["key"])
        inner = _inside_a_list(details["loc"])
        if (place, inner) not in found:
            message = _message_inside(details) if inner else _message(place, details["type"], context, values)
            line, where = _where(place, context.get("involves", ()), written, overrides)
            found[place, inner] = (line, f"{where}: {'.'.join(place)}{inner}: {message}")
    return [text for _, text in sorted(found.values(), key=lambda item: item[0])]


def _inside_a_list(loc: tuple[int | str, ...]) -> str:
    """Return ``[2].weight`` for a key of the second mapping in a list, otherwise an empty text."""
    return f"[{loc[2] + 1}].{loc[3]}" if len(loc) == 4 and isinstance(loc[2], int) else ""


def _message_inside(details: Any) -> str:
    """Return what is wrong with a key of a mapping in a list."""
    if details["type"] == "rule":
        return details["ctx"]["message"]
    if details["type"] == "extra_forbidden":
        section, key, _, name = details["loc"]
        keys = list(item_fields(section, key))
        close = difflib.get_close_matches(str(name), keys, n=1)
        return f"unknown key.{f' Did you mean {close[0]}?' if close else ''} Keys: {', '.join(keys)}."
    if details["type"] == "missing":
        return "required key is missing."
    section, key, _, name = details["loc"]
    field = item_fields(section, key)[name]
    return f"expected {describe_type(field)}, got {_show(details['input'])}."


def _where(
    place: Place, involves: tuple[str, ...], written: RecipeText, overrides: dict[Place, str]
) -> tuple[int, str]:
    """Return what has to be changed, after a number to sort by: an override involved in the rule, otherwise a line."""
    # ``involves`` names a key of the same section, ``section.key``, or ``section.`` for all of a section.
    others = (tuple(part for part in f"{place[0]}.{key}".split(".")[-2:] if part) for key in involves)
    involved = [place, place[:1], *others]
    for candidate in involved:
        if candidate in overrides:
            return 10**9, f"override {overrides[candidate]}"  # after every line of the file
    line = written.lines.get(place) or written.lines.get(place[:1])
    return (line, f"{written.source}:{line}") if line else (0, written.source)


def _message(place: Place, kind: str, context: dict[str, Any], values: dict[str, Any]) -> str:
    name = ".".join(place)
    if kind == "rule":
        return context["message"]
    if kind == "extra_forbidden":
        return unknown_key(name)
    if len(place) == 1:
        if kind == "missing":
            return f"required section is missing. Its keys: {', '.join(fields_of(name))}."
        return f"expected a section with keys ({', '.join(fields_of(name))}), got {_show(values[name])}."
    field = fields_of(place[0])[place[1]]
    if kind == "missing":
        return f"required key is missing ({describe_type(field)}: {field.description})."
    got = values[place[0]].get(place[1])
    rule = describe_type(field)
    return f"expected {rule}, got {_show(got)}.{_remedy(got, field.annotation, rule)}"


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"the text {value!r}" if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _remedy(got: Any, annotation: Any, rule: str) -> str:
    """Return what to write instead, as far as that can be known."""
    if isinstance(got, float) and not math.isfinite(got):
        return " NaN and infinity are refused."
    if isinstance(got, str) and "number" in rule and _is_number(got):
        return " Remove the quotes."
    # YAML 1.1's words for booleans, which are text here (`yaml_text`).
    if isinstance(got, str) and "true or false" in rule and got.lower() in ("yes", "on", "no", "off"):
        return f" Write {'true' if got.lower() in ('yes', 'on') else 'false'}."
    if not isinstance(got, str | list | dict | None) and "text" in rule and "list" not in rule:
        return " Put it in quotes."
    if isinstance(got, str):
        close = difflib.get_close_matches(got, _literals(annotation), n=1)
        return f" Did you mean {close[0]}?" if close else ""
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [word for part in get_args(annotation) for word in _literals(part)]
