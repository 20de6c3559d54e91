"""Recipes: what may be stated, found by name, loaded, overridden, refused. No torch, no transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import list_recipes, recipe_path
    from .load import load_recipe
    from .schema import Recipe

_HOME = {"Recipe": "schema", "list_recipes": "files", "load_recipe": "load", "recipe_path": "files"}

__all__ = ["Recipe", "list_recipes", "load_recipe", "recipe_path"]


def __getattr__(name: str) -> Any:
    # Imported when it is first used: the other modules here serve without what these need.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
