"""Recipes: what may be stated, found by name, loaded, overridden, refused. No torch, no transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .files import list_recipes, recipe_path
    from .load import load_recipe
    from .schema import Recipe

_HOME = {"Recipe": "schema", "list_recipes": "files", "load_recipe": "load", "recipe_path": "files"}

__all__ = ["Recipe", "list_recipes", "load_recipe", "recipe_path"]

__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
