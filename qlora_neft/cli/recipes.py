"""The verbs that read recipes: ls, show, diff, cp, validate, schema."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..display.tables import Table
from ..display.terminal import echo, echo_result
from ..errors import RecipeError, UserInputError
from .options import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    complete_recipe,
    complete_recipe_or_override,
    print_json,
)

if TYPE_CHECKING:
    from ..fit.shipped import Shipped


def ls(as_json: JsonOption = False) -> None:
    """List the recipes that ship with the package, with licenses and the smallest card each fits on.

    A card's size is the planner's answer, as `fit` gives it: not measured.
    """
    from ..fit.shipped import TITLES, shipped_recipes
    from ..recipe.licenses import license_of_data, license_of_model

    found = shipped_recipes()
    if as_json:
        print_json([_listed(one) for one in found])
        return

    def cells(one: Shipped) -> list[str]:
        base, data, noise = one.recipe.model.name_or_path, one.recipe.data.path, one.recipe.neftune
        return [
            one.name,
            one.card_text,
            f"{base} ({license_of_model(base)})",
            f"{data} ({license_of_data(data)})",
            f"alpha {noise.noise_alpha:g}" if noise is not None and noise.noise_alpha else "no noise",
        ]

    lines = Table((), [cells(one) for one in found], align="l").plain().splitlines()
    for group, title in TITLES.items():
        echo(f"{title}:")
        for one, line in zip(found, lines, strict=True):
            if one.group == group:
                echo(f"  {line}")
    echo("Card: the smallest by the planner, not measured; *: host memory must help. One in full: qlora-neft show NAME")


def _listed(one: Shipped) -> dict[str, Any]:
    from ..recipe.licenses import license_of_data, license_of_model

    recipe = one.recipe
    base, data = license_of_model(recipe.model.name_or_path), license_of_data(recipe.data.path)
    return {
        "name": one.name,
        "group": one.group,
        "model": recipe.model.name_or_path,
        "model_license": base.name,
        "model_gated": base.gated,
        "data": recipe.data.path,
        "data_license": data.name,
        "data_gated": data.gated,
        "card_gib": one.card,
        "card_is_helped_by_host_memory": one.is_helped,
        "noise_alpha": recipe.neftune.noise_alpha if recipe.neftune else 0.0,
        "effective_batch_size": recipe.train.effective_batch_size,
        "learning_rate": recipe.train.learning_rate,
    }


def show(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="A recipe's name, or the path to a YAML file.", autocompletion=complete_recipe
        ),
    ] = None,
    overrides: OverridesArgument = None,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys",
            help="List every key with its type, default and unit, or those that begin with NAME, such as lora.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a complete recipe, overrides applied."""
    if keys:
        _show_keys([word for word in (name, *(overrides or ())) if word is not None], as_json)
        return
    if name is None:
        raise UserInputError("show: name a recipe (qlora-neft ls lists them), or ask for --keys.")
    from ..recipe import load_recipe

    recipe = load_recipe(name, overrides or ())
    if as_json:
        print_json(recipe.to_dict())
    else:
        echo_result(recipe.to_yaml().rstrip())


def _show_keys(beginnings: list[str], as_json: bool) -> None:
    from dataclasses import asdict

    from ..recipe.keys import key_table

    keys = list(key_table())
    for word in beginnings:
        if not any(key.name.startswith(word) for key in keys):
            raise UserInputError(f"--keys: no key begins with {word!r}. All of them: qlora-neft show --keys")
    keys = [key for key in keys if not beginnings or key.name.startswith(tuple(beginnings))]
    if as_json:
        print_json([asdict(key) for key in keys])
        return
    rows = []
    for key in keys:
        default = key.default if key.default == "required" else f"default {key.default}"
        rows.append([key.name, f"{key.about}. {key.type}; {default}"])
    echo(Table((), rows, align="l").plain())


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A recipe's name or path.", autocompletion=complete_recipe)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another recipe.", autocompletion=complete_recipe)],
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Print the keys in which two recipes differ, side by side.

    Overrides apply to B.
    """
    from ..recipe import load_recipe

    left, right = load_recipe(a).flat(), load_recipe(b, overrides or ()).flat()
    # A dictionary as an ordered set: A's keys in the order of the recipe, then those that only B has.
    keys = [key for key in {**left, **right} if left.get(key) != right.get(key)]
    if as_json:
        print_json({key: [left.get(key), right.get(key)] for key in keys})
    elif keys:
        rows = [[key, json.dumps(left.get(key)), json.dumps(right.get(key))] for key in keys]
        echo(Table(("", a, b), rows, align="l").plain())
    else:
        echo("no difference")


def cp(
    name: RecipeArgument,
    dest: Annotated[Path, typer.Argument(help="The new file, or a folder to put it in.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe, comments included, to edit it."""
    from ..files import whole_file
    from ..recipe.load import find_recipe

    # The file itself, not the loaded recipe: comments and layout are copied too.
    source = find_recipe(name)
    target = dest / source.name if dest.is_dir() else dest
    if target.exists() and target.samefile(source):
        raise UserInputError(f"{target}: is the recipe itself. Name another file.")
    if target.exists() and not force:
        raise UserInputError(f"{target}: already exists. Name another file, or replace it with --force.")
    if not target.parent.is_dir():
        raise UserInputError(f"{target}: there is no folder {target.parent}. Create it first.")
    try:
        # Not shutil.copy: an installed package may be read-only, and the copy is there to be edited.
        with whole_file(target) as draft:
            shutil.copyfile(source, draft)
    except OSError as error:
        raise UserInputError(f"{target}: cannot be written: {error.strerror}.") from error
    echo(f"{target}: copied from {source.stem}. After editing: qlora-neft validate {target}")


def validate(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help="Recipes by name or path; a word with an equals sign is an override of all of them.",
            autocompletion=complete_recipe_or_override,
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Check recipes and print every problem.

    Exit code 2 if there is one.
    """
    from ..recipe import load_recipe
    from ..recipe.override_files import is_override

    # A file's name may hold an equals sign; then the file is meant.
    recipes = [name for name in names if not is_override(name) or Path(name).exists()]
    overrides = [name for name in names if name not in recipes]
    if not recipes:
        raise UserInputError(f"validate: name a recipe to check, got overrides alone: {' '.join(overrides)}")
    # Every recipe is checked, whatever is wrong with the ones before.
    problems: dict[str, list[str]] = {}
    for name in recipes:
        try:
            load_recipe(name, overrides)
            problems[name] = []
        except RecipeError as error:
            problems[name] = error.problems
    if as_json:
        print_json([{"recipe": name, "ok": not found, "problems": found} for name, found in problems.items()])
    else:
        for name, found in problems.items():
            # Problems go to stderr as every error does; stdout lists the recipes that are in order.
            echo(f"{name}: {_count(found)}", err=bool(found))
            for problem in found:
                echo(f"  {problem}", err=True)
    if any(problems.values()):
        raise typer.Exit(2)


def schema(
    of: Annotated[
        str | None,
        typer.Option(metavar="VERB", help="Instead: of what a verb prints under --json, such as 'eval loss'."),
    ] = None,
) -> None:
    """Print the JSON Schema of recipes, for editors.

    They complete keys and values by it, and underline what is wrong.
    """
    if of is not None:
        from .json_output import output_schema

        print_json(output_schema(of))
        return
    from ..recipe.json_schema import json_schema

    print_json(json_schema())


def _count(problems: Sequence[str]) -> str:
    return {0: "ok", 1: "1 problem"}.get(len(problems), f"{len(problems)} problems")
