"""Recipes: their schema, and how they are found, loaded, overridden and refused. No torch, no transformers."""

from __future__ import annotations

from .load import list_recipes, load_recipe, recipe_of_record, recipe_path
from .schema import Recipe

__all__ = ["Recipe", "list_recipes", "load_recipe", "recipe_of_record", "recipe_path"]
