"""A recipe as others may read it: the base by its Hub id, local files by their names alone."""

from __future__ import annotations

import copy
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..data.sources import is_local
from ..files.bundled import PREFIX
from ..files.suffixes import JINJA_SUFFIXES

TEMPLATE_FILE = "chat_template.jinja"
PATHS = ("path", "eval_path")
OF_ITS_AUTHOR = ("mirror_dir", "push_to", "push_every")  # keys of machine


def public_recipe(recipe: dict[str, Any], base_id: str, commit: str | None) -> dict[str, Any]:
    """The recipe without a path of this machine; it loads again, where the named files lie in the current directory.

    Args:
        recipe: `Recipe.to_dict`.
        base_id: Hub id of the base.
        commit: Of the base, None if it is not known.
    """
    public = copy.deepcopy(recipe)
    public["model"] |= {"name_or_path": base_id, "revision": commit or public["model"].get("revision", "main")}
    for source in _sources(public):
        for key in PATHS:
            if source.get(key):
                source[key] = public_path(source[key])
        if str(source.get("prompt_template", "")).endswith(JINJA_SUFFIXES):
            source["prompt_template"] = TEMPLATE_FILE  # published beside it
    for key in OF_ITS_AUTHOR:
        public.get("machine", {}).pop(key, None)
    return public


def public_path(path: str) -> str:
    """A Hub id or bundled file as it is; of a local path the last part."""
    return path if is_public(path) else file_name(path)


def is_public(path: str) -> bool:
    """Whether others can read the data of that name: a Hub id, or a file of the package."""
    return path.startswith(PREFIX) or is_hub_id(path)


def is_hub_id(path: str) -> bool:
    """Whether a path of data is a Hub id."""
    return not path.startswith(PREFIX) and not is_local(path) and path.count("/") <= 1 and "*" not in path


def file_name(path: str) -> str:
    """The last part of a path of either kind of system."""
    return PurePosixPath(PureWindowsPath(path).as_posix()).name


def local_names(recipe: dict[str, Any] | None) -> dict[str, str]:
    """What stands in a recipe and must not be published, with what stands there instead; the longest first."""
    found = {}
    for path in data_paths(recipe):
        found[path] = public_path(path)
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def data_paths(recipe: dict[str, Any] | None) -> list[str]:
    """Every path of data in a recipe, each once."""
    return list(dict.fromkeys(source[key] for source in _sources(recipe) for key in PATHS if source.get(key)))


def uses_template_file(recipe: dict[str, Any]) -> bool:
    """Whether a recipe puts a Jinja file of the user's around the rows."""
    return any(str(source.get("prompt_template", "")).endswith(JINJA_SUFFIXES) for source in _sources(recipe))


def _sources(recipe: dict[str, Any] | None) -> list[dict[str, Any]]:
    data = (recipe or {}).get("data") or {}
    return [data, *data.get("mixture", [])]
