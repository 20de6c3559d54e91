"""A recipe's text as a mapping, with the line of every key. The schema's rules are not applied here.

Plain words are read as in YAML 1.2's core schema: ``2e-4`` is a number (YAML 1.1 reads text), ``no`` and ``on`` are
text, ``010`` is ten, ``1:30`` is not a number of seconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError
from ..yaml_budget import check_budget

# Tag, form of the word, its possible first characters: PyYAML looks resolvers up by the first character.
_PLAIN_WORDS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # Before float, whose form fits whole numbers too: the first that fits wins.
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's plain words."""

    # Its own and empty, or it would inherit the words of YAML 1.1.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own attribute

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))  # PyYAML's own reads 010 as eight


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper for `_Loader`: text that looks like one of its numbers is quoted."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own attribute


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _PLAIN_WORDS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


@dataclass(frozen=True)
class RecipeText:
    """A recipe as written: its values, the line of every section and key, from 1, and the sections without content."""

    source: str
    values: dict[str, Any]
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    empty: frozenset[str] = frozenset()


def read_recipe_text(path: Path, source: str) -> RecipeText:
    """Read a recipe file.

    Args:
        path: The file.
        source: The file's name in messages.

    Raises:
        RecipeError: If the file cannot be read, is not UTF-8, not YAML, empty, not a mapping, or has a key twice.
    """
    try:
        # Editors on Windows may begin the file with a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}.") from error
    try:
        root, values = _compose(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}{_where(error)}: not valid YAML: {_reason(error)}.") from error
    if root is None:
        raise RecipeError(f"{source}: is empty. Start from a shipped recipe: qlora-neft cp NAME {source}")
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{source}:1: a recipe is a mapping of sections (model:, lora:, ...), got a {_kind(values)}.")
    lines, repeated = _lines(root)
    if repeated:
        raise RecipeError([f"{source}:{problem}" for problem in repeated], source)
    empty = frozenset(str(key.value) for key, value in root.value if value.value == "" and value.style is None)
    return RecipeText(source, values, lines, empty)


def parse_value(text: str) -> Any:
    """Read one value as a recipe does, for instance ``2e-4``, ``null`` or ``[q_proj, v_proj]``.

    Raises:
        ValueError: If it is not valid YAML; the message says why.
    """
    try:
        return _compose(text)[1]
    except yaml.YAMLError as error:
        raise ValueError(_reason(error)) from error


def compose_text(text: str) -> yaml.Node | None:
    """Return a recipe as a tree, in which every node knows its place in the text; None for an empty one.

    Raises:
        yaml.YAMLError: If it is not valid YAML.
    """
    return _compose(text)[0]


def dump_yaml(values: dict[str, Any]) -> str:
    """Return YAML from which `read_recipe_text` reads the same values, in the given order."""
    # Wide enough that no text is folded over several lines.
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _compose(text: str) -> tuple[yaml.Node | None, Any]:
    """Return one document as a tree, which knows the lines, and as values, which do not."""
    check_budget(text)
    loader = _Loader(text)
    try:
        # In two stages, because PyYAML's values no longer know their lines.
        root = loader.get_single_node()
        if root is None:
            return None, None
        try:
            return root, loader.construct_document(root)
        except (ValueError, RecursionError) as error:  # "!!int x", a number of 5,000 digits
            raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _lines(root: yaml.MappingNode) -> tuple[dict[tuple[str, ...], int], list[str]]:
    """Return the line of every section and key, and a message for every key written twice: PyYAML keeps the last."""
    lines: dict[tuple[str, ...], int] = {}
    repeated: list[str] = []

    def note(node: yaml.MappingNode, prefix: tuple[str, ...]) -> None:
        for key, value in node.value:
            where, line = (*prefix, str(key.value)), key.start_mark.line + 1
            if where in lines:
                name = ".".join(where)
                repeated.append(f"{line}: {name}: already set in line {lines[where]}. Keep one of the two.")
            lines.setdefault(where, line)  # the first of the two, for the message
            if not prefix and isinstance(value, yaml.MappingNode):
                note(value, where)

    note(root, ())
    return lines, repeated


def _where(error: yaml.YAMLError) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return f":{mark.line + 1}" if mark else ""


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return " ".join(part for part in (error.context, error.problem) if part)
    return " ".join(str(error).split())


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else f"single value ({value!r})"
