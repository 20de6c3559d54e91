"""Change values in a recipe's text, and leave every other line as it is, comments included."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml

from .yaml_text import compose_text

_TRAILING = re.compile(r"[ \t]+#[^\n]*")


class CannotEdit(ValueError):
    """A recipe is written in a way in which a value cannot be replaced in place."""


def with_values(text: str, values: Mapping[str, str], remarks: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return a recipe's text with other values.

    Args:
        text: The recipe, valid YAML.
        values: ``section.key`` to its value as YAML. A key that is not there is added at the end of its section.
        remarks: Lines of comment to put above some of these keys. A comment at the end of such a key's line spoke of
            the former value: it goes into a line of its own below them, with that value.

    Raises:
        CannotEdit: If a value is no scalar and no list or mapping in brackets, or its place in the file is none.
    """
    for key, value in values.items():
        lines = (remarks or {}).get(key, ())
        text = _with_value(text, key, value, lines)
    return text


def _with_value(text: str, name: str, value: str, remarks: Sequence[str]) -> str:
    section_name, _, key = name.partition(".")
    if not key or "." in key:
        raise CannotEdit(name)
    root = compose_text(text)
    section = _entry(root, section_name)
    if section is None:
        body = [*(f"  # {line}" for line in remarks), f"  {key}: {value}"]
        return text.rstrip("\n") + "\n" + "\n".join([f"{section_name}:", *body]) + "\n"
    section_key, keys = section
    if not isinstance(keys, yaml.MappingNode):
        raise CannotEdit(name)
    entry = _entry(keys, key)
    if entry is None:
        return _added(text, keys, f"{key}: {value}", remarks)
    place, node = entry
    if not (isinstance(node, yaml.ScalarNode) and node.style not in ("|", ">")) and not getattr(
        node, "flow_style", False
    ):
        raise CannotEdit(name)
    start, end = node.start_mark.index, node.end_mark.index
    if not remarks:
        return text[:start] + value + text[end:]
    before, rest = text[start:end], text[end:]
    lines = list(remarks)
    trailing = None if keys.flow_style else _TRAILING.match(rest)
    if trailing:
        rest = rest[trailing.end() :]
        lines.append(f"before: {before}  ({trailing[0].strip().removeprefix('#').strip()})")
    else:
        lines.append(f"before: {before}")
    # Above the line of the key; in a section in braces, above the whole section.
    line = _line_start(text, (section_key if keys.flow_style else place).start_mark.index)
    indent = " " * (section_key if keys.flow_style else place).start_mark.column
    return text[:line] + "".join(f"{indent}# {one}\n" for one in lines) + text[line:start] + value + rest


def _entry(mapping: yaml.Node | None, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    entries = mapping.value if isinstance(mapping, yaml.MappingNode) else []
    return next(((name, node) for name, node in entries if name.value == key), None)


def _added(text: str, keys: yaml.MappingNode, entry: str, remarks: Sequence[str]) -> str:
    if not keys.value:  # {}
        start, end = keys.start_mark, keys.end_mark
        assert start is not None and end is not None  # it was read from a text
        return text[: start.index] + f"{{{entry}}}" + text[end.index :]
    last_key, last_value = keys.value[-1]
    if keys.flow_style:
        end = last_value.end_mark.index
        return f"{text[:end]}, {entry}{text[end:]}"
    # After the line on which the last value ends: a comment that stands there belongs to it.
    end = text.find("\n", last_value.end_mark.index - (text[: last_value.end_mark.index].endswith("\n")))
    end = len(text) if end < 0 else end + 1
    indent = " " * last_key.start_mark.column
    lines = "".join(f"{indent}{line}\n" for line in (*(f"# {one}" for one in remarks), entry))
    joint = "" if text[:end].endswith("\n") else "\n"
    return text[:end] + joint + lines + text[end:]


def _line_start(text: str, index: int) -> int:
    return text.rfind("\n", 0, index) + 1
