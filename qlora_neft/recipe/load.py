"""Load a recipe: find its file, read it, apply overrides, check the whole. Also read recipes back from records.

What a recipe may say is in `schema`. No torch, no transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from ..errors import RecipeError
from .keys import fields_of, is_mapping, key_names, section_class, section_names, unknown_key
from .override_files import expanded
from .problems import describe_problems
from .schema import Data, MixedSource, Recipe, Section
from .yaml_text import parse_value, read_recipe_text

NULLABLE = ("quantization", "lora")  # sections that are stated as null, to do without; neftune is just left out
_PACKAGE = Path(__file__).resolve().parents[1]


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and check it.

    Local paths inside a recipe are relative to the current directory, not to the recipe's file.

    Args:
        name_or_path: Name of a shipped recipe, or path to a YAML file.
        overrides: ``section.key=value`` each, or ``@`` and a file of them, see `override_files`; they take precedence
            over the recipe's file, and later ones over earlier ones.

    Returns:
        The complete recipe, frozen, every default filled in.

    Raises:
        RecipeError: If the recipe cannot be found or read; or, with all of them at once, if it breaks rules.
    """
    path = find_recipe(name_or_path)
    written = read_recipe_text(path, _source(path))
    words, unread = expanded(overrides, recipe_dir())
    values, origins, problems = apply_overrides(written.values, words)
    problems = unread + problems
    # "lora:" with nothing under it is an empty section; "lora: null" is none.
    empty = written.empty - {place[0] for place in origins if len(place) == 1}
    values = {name: _keys(name, value, is_empty=name in empty) for name, value in _with_text_keys(values).items()}
    # Left out, the settings are those of the adapter that training goes on from.
    if isinstance(values.get("model"), dict) and values["model"].get("adapter") and values.get("lora") == {}:
        values["lora"] = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        # The values are checked even if an override was not understood, so that one try shows everything.
        problems = describe_problems(error, values, written, origins) + problems
        raise RecipeError(problems, written.source) from None  # pydantic's text would say it all again
    if problems:
        raise RecipeError(problems, written.source)
    return recipe


def _source(path: Path) -> str:
    """Return the name that messages use for a file: a shipped recipe's place, any other path as it was given."""
    return f"recipes/{path.name}" if path.parent == recipe_dir() else str(path)


def _with_text_keys(values: dict[Any, Any]) -> dict[str, Any]:
    # YAML also has numbers and null as keys. As text they are unknown keys like any other.
    return {str(key): _with_text_keys(value) if isinstance(value, dict) else value for key, value in values.items()}


def _keys(section: str, value: Any, *, is_empty: bool) -> Any:
    if value is not None or section not in Recipe.model_fields:
        return value
    # "machine:" with nothing under it is an empty section; "neftune:" with nothing under it is no section.
    may_be_absent = section == "neftune" or (section in NULLABLE and not is_empty)
    return None if may_be_absent else {}


# ---- Finding the file ----


def recipe_dir() -> Path:
    """Return the folder of the recipes: the repository's own, otherwise the copy that ships in the wheel."""
    repository = _PACKAGE.parent
    # pyproject.toml tells a clone from site-packages, where another package may have put a "recipes" folder.
    if (repository / "pyproject.toml").is_file() and (repository / "recipes").is_dir():
        return repository / "recipes"
    return _PACKAGE / "recipes"


def list_recipes() -> list[str]:
    """Return the names of the recipes that ship with the package, sorted."""
    return sorted(path.stem for path in recipe_dir().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Return the file of the shipped recipe ``name``.

    Raises:
        RecipeError: If there is no such recipe; the message lists those there are.
    """
    names = list_recipes()
    if name in names:
        return recipe_dir() / f"{name}.yaml"
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise RecipeError(
        f"{name}: unknown recipe.{hint} Recipes: {', '.join(names)}. A file of your own is named by its path."
    )


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the file meant by a recipe's name or by a path to a YAML file.

    A word that contains a folder or ends in .yaml or .yml is a path. Any other word is a recipe's name, and a path
    only if no recipe has that name and such a file exists.

    Raises:
        RecipeError: If there is no such recipe or file, or it is a folder.
    """
    path = Path(name_or_path).expanduser()
    # A `Path` is always a path, even if a recipe has the same name.
    is_name = isinstance(name_or_path, str) and path.name == name_or_path and path.suffix not in (".yaml", ".yml")
    if is_name and (name_or_path in list_recipes() or not path.is_file()):
        return recipe_path(str(name_or_path))
    if path.is_dir():
        raise RecipeError(f"{name_or_path}: is a folder. Name one YAML file in it.")
    if not path.exists():
        known = f" Did you mean the recipe {path.stem}?" if path.stem in list_recipes() else ""
        raise RecipeError(f"{name_or_path}: no such file.{known} Shipped recipes: qlora-neft ls.")
    return path


# ---- Overrides ----


class Overridden(NamedTuple):
    """A recipe's values with overrides applied.

    Attributes:
        values: The new values.
        origins: The override that set each key, by the key's place.
        problems: One line per override that cannot be understood.
    """

    values: dict[str, Any]
    origins: dict[tuple[str, ...], str]
    problems: list[str]


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> Overridden:
    """Apply overrides to a recipe's values, later ones over earlier ones.

    A whole section can be overridden too: ``neftune=null`` removes it, ``machine={}`` empties it. Overriding a key of
    an absent section creates the section.

    Args:
        values: The recipe as read from its file; not changed.
        overrides: ``section.key=value`` each.
    """
    merged = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in values.items()}
    origins: dict[tuple[str, ...], str] = {}
    problems: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        place = tuple(name.split("."))
        problem, value = _problem(place, equals), None
        try:
            value = parse_value(text)
        except ValueError as error:
            problem = problem or f"the value is not valid YAML: {error}. Put it in quotes."
        if problem:
            problems.append(f"override {override}: {problem}")
            continue
        _put(merged, place, value)
        # An override of a whole section makes earlier ones of its keys void.
        origins = {other: text for other, text in origins.items() if other[: len(place)] != place}
        origins[place] = override
    return Overridden(merged, origins, problems)


def _put(values: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    if len(place) == 1:
        values[place[0]] = dict(value) if isinstance(value, dict) else value
        return
    section, key, *inner = place
    # Absent, or not a section at all, which the override of a key then replaces.
    if not isinstance(values.get(section), dict):
        values[section] = {}
    if inner:  # one entry of a mapping
        others = values[section].get(key)
        value = {**(others if isinstance(others, dict) else {}), inner[0]: value}
    values[section][key] = value


def _problem(place: tuple[str, ...], equals: str) -> str | None:
    """Return what is wrong with an override's left-hand side, None if nothing is."""
    name = ".".join(place)
    if not equals:
        return "not of the form section.key=value."
    if name in key_names() or name in section_names():
        return None
    if len(place) == 3 and place[2] and is_mapping(".".join(place[:2])):
        return None
    if len(place) == 2 and place[0] in section_names() and place[1] == "":
        return f"names no key. Keys of {place[0]}: {', '.join(fields_of(place[0]))}."
    return unknown_key(name)


# ---- Recorded recipes ----


def recipe_of_record(values: object) -> Recipe | None:
    """Read a recorded recipe as far as it can be used: an older or newer version may have written it.

    Nothing is refused. Keys that this version does not know are left out, and so are values of another type; what is
    not stated has its default, or None where the schema requires it. Rules that only spare a user a surprise (a key
    without effect) are not applied: the run was made.

    Args:
        values: ``recipe`` of ``run.json`` or ``summary.json``, or the content of ``recipe.yaml``.

    Returns:
        The recipe; None if ``values`` is no mapping.
    """
    if not isinstance(values, Mapping):
        return None
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        # Section by section, so that one damaged value costs no more than itself.
        sections: dict[str, Any] = {
            name: _usable(section_class(name), values.get(name))
            for name in section_names()
            if name != "neftune" or isinstance(values.get(name), Mapping)
        }
        sections |= {name: None for name in NULLABLE if name in values and values[name] is None}
        return Recipe.model_construct(**sections)


def _usable(section: type[Section], values: object) -> Section:
    """Return a section with the values that its types take; the others are as if they were not stated."""
    stated: Mapping[str, Any] = values if isinstance(values, Mapping) else {}
    known = {key: stated[key] for key in section.model_fields if key in stated}
    try:
        section.model_validate(known)
    except ValidationError as error:
        # Broken rules do not count: the run was made, and the values are of the right type.
        for key in {details["loc"][0] for details in error.errors() if details["type"] != "rule"}:
            known.pop(key, None)
    if section is Data and isinstance(stated.get("mixture"), list):
        known["mixture"] = [_usable(MixedSource, item) for item in stated["mixture"]]
    # model_construct checks nothing, and fills in defaults alone.
    required = [key for key, field in section.model_fields.items() if field.is_required()]
    return section.model_construct(_fields_set=set(known), **{**dict.fromkeys(required), **known})
