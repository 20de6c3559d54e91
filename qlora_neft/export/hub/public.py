"""The limits of what leaves this machine: published file names, recipes without local paths, a check for secrets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple, TypeVar

from ...adapter.folder import CONFIG, RECIPE
from ...errors import RunFailed, UserInputError
from ...paths import DATA_SUFFIXES, JINJA_SUFFIXES, kind_of
from ...recipe import Recipe
from ...recipe.schema import Data, MixedSource
from ...recipe.yaml_text import dump_yaml
from ...run_folder.record import Record
from ..leaks import paths_in, secrets_in

CARD, SUMMARY, TEMPLATE_FILE = "README.md", "training_summary.json", "chat_template.jinja"
# Keys of the machine section that concern only the author of a run.
AUTHORS_KEYS = ("mirror_dir", "push_to", "push_every", "report_to")
# Files written here, from which every path is left out.
WRITTEN_HERE = (CARD, CONFIG, RECIPE, SUMMARY)
SHOWN = 5  # places that a message names

Source = TypeVar("Source", Data, MixedSource)


class PublicBase(NamedTuple):
    """The base of an adapter as others can load it.

    Attributes:
        id: Hub id.
        commit: The commit that was trained on, None if it is not known.
    """

    id: str
    commit: str | None


class PublishedBase(Record):
    """``base`` of ``training_summary.json``."""

    id: str
    revision: str | None = None


class Published(Record):
    """Keys of ``training_summary.json`` that the summary in a run's folder lacks.

    Attributes:
        base: Hub id and commit.
        files: SHA-256 of every other file as it was written, by name.
    """

    base: PublishedBase | None = None
    files: dict[str, str] | None = None


# ---- Paths ----


def is_public(path: str) -> bool:
    """Return whether others can read the data of that name: a Hub id, or a file of the package."""
    return kind_of(path, suffixes=DATA_SUFFIXES) != "local"


def is_hub_id(path: str) -> bool:
    """Return whether data of that name is on the Hub."""
    return kind_of(path, suffixes=DATA_SUFFIXES) == "hub"


def public_path(path: str) -> str:
    """Return a Hub id or bundled file as it is, and only the last part of a local path."""
    # A Windows path is read as such on any system; as POSIX it would be one long name, folders included.
    return path if is_public(path) else PurePosixPath(PureWindowsPath(path).as_posix()).name


def data_paths(recipe: Recipe | None) -> list[str]:
    """Return every path of data in a recipe, each once."""
    if recipe is None:
        return []
    paths = [recipe.data.path, recipe.data.eval_path, *(source.path for source in recipe.data.mixture)]
    return list(dict.fromkeys(path for path in paths if path))


def without_local_paths(line: str, recipe: Recipe | None) -> str:
    """Replace every path of data in a line by its public form."""
    for path in sorted(data_paths(recipe), key=len, reverse=True):  # one may be part of another
        line = line.replace(path, public_path(path))
    return line


# ---- The recipe ----


def public_recipe(recipe: Recipe, base: PublicBase) -> Recipe:
    """Return the recipe without a path of this machine. It loads again if the files it names lie beside it.

    Args:
        recipe: As it was run.
        base: Takes the place of the recipe's own.
    """
    model = {"name_or_path": base.id, "revision": base.commit or recipe.model.revision or "main"}
    earlier = recipe.model.adapter
    if earlier and kind_of(earlier) != "hub":  # a folder, of which the name alone is published
        model["adapter"] = public_path(earlier)
    data = _public_source(recipe.data)
    changes = {"mixture": [_public_source(source) for source in data.mixture]}
    if data.eval_path:
        changes["eval_path"] = public_path(data.eval_path)
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update=model), "data": data.model_copy(update=changes)}
    )


def public_recipe_text(recipe: Recipe) -> str:
    """Write a public recipe as YAML, without the keys that concern only its author."""
    values = recipe.to_dict()
    for key in AUTHORS_KEYS:
        values["machine"].pop(key, None)
    return dump_yaml(values)


def uses_template_file(recipe: Recipe) -> bool:
    """Return whether a recipe formats its rows with a Jinja file."""
    return any(is_template_file(source.prompt_template) for source in (recipe.data, *recipe.data.mixture))


def is_template_file(prompt_template: str | None) -> bool:
    """Return whether a prompt template is a Jinja file; it is published as `TEMPLATE_FILE`."""
    return (prompt_template or "").endswith(JINJA_SUFFIXES)


def _public_source(source: Source) -> Source:
    changes = {}
    if source.path:  # a lenient reading of a damaged recipe may lack it
        changes["path"] = public_path(source.path)
    if is_template_file(source.prompt_template):
        changes["prompt_template"] = TEMPLATE_FILE
    return source.model_copy(update=changes)


# ---- Secrets ----


def refuse_secrets(folder: Path, local_paths: Iterable[str]) -> None:
    """Search every file for credentials, and for paths of this machine.

    Args:
        folder: About to be published.
        local_paths: Absolute paths that must not stand in it.

    Raises:
        UserInputError: If there is a credential or a path. The message names the files, and does not repeat a token.
        RunFailed: If there is a path in a file that is written here.
    """
    if found := secrets_in(folder):
        places = ", ".join(f"{leak.file} (line {leak.line})" for leak in found[:SHOWN])
        raise UserInputError(
            f"{places}: holds an access token or a private key, which must not be published. Remove it from the file "
            "it came from, and revoke it where it was made."
        )
    leaks = paths_in(folder, local_paths)
    if ours := [leak for leak in leaks if leak.file in WRITTEN_HERE]:
        # Our own bug, not the user's: everything that writes these files omits paths.
        raise RunFailed(
            f"{ours[0].file} would publish the path {ours[0].text!r}; nothing was written. Please report this."
        )
    if leaks:
        lines = "".join(f"\n  {leak}" for leak in leaks[:SHOWN])
        more = f"\n  and {len(leaks) - SHOWN} more" if len(leaks) > SHOWN else ""
        raise UserInputError(
            f"paths or names of this machine would be published; nothing was written:{lines}{more}\n"
            "Remove them from the files beside the adapter (in a chat template: its comments), and export again."
        )
