"""The limits of what leaves this machine: published file names, recipes without local paths, a check for secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple, TypeVar

from ...adapter.folder import CONFIG, RECIPE, WEIGHTS
from ...errors import RunFailed, UserInputError
from ...paths import DATA_SUFFIXES, JINJA_SUFFIXES, kind_of
from ...recipe import Recipe
from ...recipe.schema import Data, MixedSource
from ...recipe.yaml_text import dump_yaml
from ...run_folder.record import Record

CARD, CURVES, SUMMARY, TEMPLATE_FILE = "README.md", "loss.png", "training_summary.json", "chat_template.jinja"
# Keys of the machine section that concern only the author of a run.
AUTHORS_KEYS = ("mirror_dir", "push_to", "push_every")
# Files written here, in which a local path is a leak. A tokenizer's vocabulary may hold "/home".
SEARCHED_FOR_PATHS = (CARD, CONFIG, RECIPE, SUMMARY)
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

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
    """Search every file but the weights for tokens, and the files that are written here for paths.

    Args:
        folder: About to be published.
        local_paths: Absolute paths that must not stand in it.

    Raises:
        UserInputError: If there is a token. The message names the file and does not repeat the token.
        RunFailed: If there is a path.
    """
    tokens = [token.encode() for token in _own_tokens()]
    for path in sorted(folder.rglob("*")):
        # Weights are numbers, and large; a token in them would be chance.
        if not path.is_file() or path.name == WEIGHTS:
            continue
        content = path.read_bytes()
        if TOKEN.search(content) or any(token in content for token in tokens):
            raise UserInputError(
                f"{path.name}: holds an access token of the Hub, which must not be published. Remove it from the file "
                "it came from, and revoke it on the Hub."
            )
        found = [local for local in local_paths if path.name in SEARCHED_FOR_PATHS and _names(content, local)]
        if found:
            # Our own bug, not the user's: everything that writes these files omits paths.
            raise RunFailed(
                f"{path.name} would publish the path {found[0]!r}; nothing was written. Please report this."
            )


def _names(content: bytes, path: str) -> bool:
    """Return whether a path stands in a text: ``/data`` does not stand in ``huggingface.co/datasets``."""
    return re.search(rb"(?<![\w.])" + re.escape(path.encode()) + rb"(?![\w-])", content) is not None


def _own_tokens() -> list[str]:
    from huggingface_hub import get_token

    found = [os.environ.get(name, "").strip() for name in TOKEN_VARIABLES]
    # A short value is no token, and would be found in every file.
    return [token for token in [*found, get_token() or ""] if len(token) >= 8]
