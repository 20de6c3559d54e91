"""Where recipes are found by name: in a clone, an editable install or a wheel. No YAML, no pydantic."""

from __future__ import annotations

import difflib
from pathlib import Path

from ..errors import RecipeError

_PACKAGE = Path(__file__).resolve().parents[1]


def recipe_dir() -> Path:
    """The folder the recipes are in: the repository's own, else the copy that ships in the wheel."""
    repository = _PACKAGE.parent
    # pyproject.toml tells a clone from site-packages, where some other package may have left a "recipes".
    if (repository / "pyproject.toml").is_file() and (repository / "recipes").is_dir():
        return repository / "recipes"
    return _PACKAGE / "recipes"


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    return sorted(path.stem for path in recipe_dir().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """File of the shipped recipe ``name``.

    Raises:
        RecipeError: If there is none of that name; the message lists those there are.
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
    """File meant by a recipe's name or by a path to a YAML file.

    A word with a folder or a .yaml or .yml ending in it is a path. Any other is a recipe's name, and
    a path only if no recipe has that name and such a file exists.

    Raises:
        RecipeError: If there is no such recipe or file, or it is a folder.
    """
    path = Path(name_or_path).expanduser()
    is_name = isinstance(name_or_path, str) and path.name == name_or_path and path.suffix not in (".yaml", ".yml")
    if is_name and (name_or_path in list_recipes() or not path.is_file()):
        return recipe_path(str(name_or_path))
    if path.is_dir():
        raise RecipeError(f"{name_or_path}: is a folder. Name one YAML file in it.")
    if not path.exists():
        known = f" Did you mean the recipe {path.stem}?" if path.stem in list_recipes() else ""
        raise RecipeError(f"{name_or_path}: no such file.{known} Shipped recipes: qlora-neft ls.")
    return path
