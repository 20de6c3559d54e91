"""Overrides of a recipe from the command line: ``section.key=value``, the value read as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .keys import fields_of, key_names, section_names, unknown_key
from .yaml_text import parse_value


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[tuple[str, ...], str], list[str]]:
    """Lay overrides over a recipe's values, the later over the earlier.

    A whole section can be overridden too: ``neftune=null`` takes it out, ``machine={}`` empties it.
    Overriding a key of a section that is absent creates the section.

    Args:
        values: The recipe as read from its file; left as it is.
        overrides: ``section.key=value`` each.

    Returns:
        The new values; the override that set each key, by its place; and one line per override that
        cannot be understood.
    """
    merged = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in values.items()}
    origins: dict[tuple[str, ...], str] = {}
    problems: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        place = tuple(name.split("."))
        problem = _problem(place, equals)
        try:
            value = parse_value(text)
        except ValueError as error:
            problem = problem or f"the value is not valid YAML: {error}. Put it in quotes."
        if problem:
            problems.append(f"override {override}: {problem}")
            continue
        _put(merged, place, value)
        origins = {other: text for other, text in origins.items() if other[: len(place)] != place}
        origins[place] = override
    return merged, origins, problems


def _put(values: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    if len(place) == 1:
        values[place[0]] = dict(value) if isinstance(value, dict) else value
        return
    section, key = place
    if not isinstance(values.get(section), dict):
        values[section] = {}
    values[section][key] = value


def _problem(place: tuple[str, ...], equals: str) -> str | None:
    """What is wrong with the left-hand side, if anything."""
    name = ".".join(place)
    if not equals:
        return "not of the form section.key=value."
    if name in key_names() or name in section_names():
        return None
    if len(place) == 2 and place[0] in section_names() and place[1] == "":
        return f"names no key. Keys of {place[0]}: {', '.join(fields_of(place[0]))}."
    return unknown_key(name)
