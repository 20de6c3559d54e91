"""Load a recipe: find it, read it, lay overrides over it, check all of it. No torch, no transformers.

What a recipe may say is in `schema`; where recipes are found is in `files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import RecipeError
from .files import find_recipe, list_recipes, recipe_dir, recipe_path
from .overrides import apply_overrides
from .problems import describe_problems
from .schema import Recipe
from .yaml_text import read_recipe_text

__all__ = ["Recipe", "list_recipes", "load_recipe", "recipe_path"]


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and check it.

    Local paths inside a recipe are relative to the current directory, not to the recipe's file.

    Args:
        name_or_path: Name of a shipped recipe, or path to a YAML file.
        overrides: ``section.key=value`` each; they beat the file, the later the earlier.

    Returns:
        The complete recipe, frozen, every default filled in.

    Raises:
        RecipeError: If the recipe cannot be found or read, or with all the rules it breaks at once.
    """
    path = find_recipe(name_or_path)
    written = read_recipe_text(path, _source(path))
    values, origins, problems = apply_overrides(written.values, overrides)
    values = {section: _keys(section, value) for section, value in _with_names(values).items()}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = describe_problems(error, values, written, origins) + problems
        raise RecipeError(problems, written.source) from None
    if problems:
        raise RecipeError(problems, written.source)
    return recipe


def _source(path: Path) -> str:
    """How messages name the file: a shipped recipe by its place among them, any other as it was given."""
    return f"recipes/{path.name}" if path.parent == recipe_dir() else str(path)


def _with_names(values: dict[Any, Any]) -> dict[str, Any]:
    """Keys as text: YAML also has numbers and null for keys, and they are unknown keys like any other."""
    return {str(key): _with_names(value) if isinstance(value, dict) else value for key, value in values.items()}


def _keys(section: str, value: Any) -> Any:
    # "machine:" with nothing under it is an empty section; "neftune:" with nothing under it is none.
    return {} if value is None and section != "neftune" and section in Recipe.model_fields else value
