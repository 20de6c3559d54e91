"""The same run: what a resume must find as it was. Content is compared; a path only says where content is found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserInputError
from ..paths import kind_of
from ..recipe import Recipe
from ..recipe.settings import learned, without_places
from .record import RunFile, RunIdentity

# Keys of a base's configuration that decide nothing: who wrote it, and whether generation keeps a cache.
NOT_LEARNED = frozenset({"_name_or_path", "transformers_version", "use_cache"})
KEYS_NAMED = 8  # of a configuration, in messages
BASE, DATA, TEMPLATE = "model.name_or_path", "data.path", "data.prompt_template"
HELD_OUT = "data.eval_path"


def check_same(before: RunFile, recipe: Recipe, where: Path, key: str = "--output-dir") -> list[str]:
    """Refuse to continue a run under a recipe that learns something else.

    Args:
        before: What is recorded of the run. Its recipe is compared as it was written: a key that only another version
            knows makes another run.
        recipe: What is to be learned now.
        where: The folder of the run.
        key: The option that names the folder.

    Returns:
        The keys that say where something is found and say another place now, one line each. What is found there must
        be compared: see `check_base`, `check_tokens` and `check_weights`. None in the record of an earlier version,
        which kept too little to compare: there another place is another run.

    Raises:
        UserInputError: With every key that differs.
    """
    old, new = learned(before.recipe or {}), recipe.learned()
    refused, moved = _different(old, new), []
    if before.identity is not None:
        everything = refused
        refused = _different(without_places(old), without_places(new))
        moved = [line for name, line in everything.items() if name not in refused]
    if refused:
        lines = [f"  {line}" for line in refused.values()]
        raise UserInputError(
            f"{key}: {str(where)!r} holds a run that learns something else:\n" + "\n".join(lines) + "\n"
            f"Only the machine section may change during a run. Use that run's recipe, or give a new {key}."
        )
    return moved


def is_another_base(before: RunFile, recipe: Recipe) -> bool:
    """Tell whether a recipe names another model of the Hub than a run did: a folder may have moved, a model has not."""
    old, new = ((before.recipe or {}).get("model") or {}), recipe.to_dict()["model"]
    keys = ("name_or_path", "adapter")
    return any(
        old.get(key) != new.get(key) and all(name and kind_of(name) == "hub" for name in (old.get(key), new.get(key)))
        for key in keys
    )


def check_base(earlier: RunFile | None, now: RunIdentity) -> None:
    """Refuse another configuration, tokenizer or template than a run began with, before rows are prepared by it.

    Args:
        earlier: What is recorded of the run, None for a new one.
        now: The identity as far as it is known without rows.

    Raises:
        UserInputError: With everything that has changed.
    """
    if earlier is None or (before := earlier.identity) is None:
        return
    found = [
        *_configurations(before.base_config, now.base_config),
        # Another version of the library writes the same tokenizer in other words; then the tokens decide.
        *(_tokenizers(before, now) if _same_libraries(before, now) else ()),
        *_special_tokens(before.special_tokens, now.special_tokens),
        *_templates(before.templates, now.templates),
    ]
    _refuse(found)


def check_tokens(earlier: RunFile | None, now: RunIdentity, data_sha256: str) -> None:
    """Refuse to continue a run on other tokens than it began with.

    Args:
        earlier: What is recorded of the run, None for a new one.
        now: The identity.
        data_sha256: Hash of rows and template as earlier versions recorded it.

    Raises:
        UserInputError: With what has changed.
    """
    if earlier is None:
        return
    if (before := earlier.identity) is None:
        if earlier.data_sha256 not in (None, data_sha256):  # None: not recorded, as in a damaged file
            _refuse([_changed(DATA, "rows", several=True)])
        return
    others = [] if before.held_out in (None, now.held_out) else [_changed(HELD_OUT, "held-out rows", several=True)]
    if before.tokens in (None, now.tokens):
        _refuse(others)
        return
    found = others + ([] if before.rows == now.rows else [_changed(DATA, "rows", several=True)])
    found += [] if _same_libraries(before, now) else _tokenizers(before, now)
    if before.now != now.now:
        found.append(f"{TEMPLATE}: the template wrote the date {before.now} when this run began, and {now.now} now.")
    if different := _different(before.versions, now.versions):
        lines = ", ".join(different.values())
        found.append(f"versions: the same text is cut into other tokens ({lines}). Install those this run began with.")
    if not found:
        found.append(
            f"{TEMPLATE}: the tokens of the training rows are not those this run began with, though rows, template and "
            "tokenizer are: the template writes something that changes from one rendering to the next."
        )
    _refuse(found)


def check_weights(earlier: RunFile | None, base_sha256: str, adapter_sha256: str | None = None) -> None:
    """Refuse to continue a run on other frozen weights, or from another adapter, than it began with.

    Raises:
        UserInputError: If one of them has changed.
    """
    if earlier is None:
        return
    pairs = ((BASE, earlier.base_sha256, base_sha256), ("model.adapter", earlier.adapter_sha256, adapter_sha256))
    _refuse([_changed(key, "weights", several=True) for key, before, now in pairs if before not in (None, now)])


def _refuse(found: Iterable[str]) -> None:
    found = list(found)
    if found:
        head = "" if len(found) == 1 else f"{len(found)} things are not as this run began:\n  "
        raise UserInputError(head + "\n  ".join(found) + " Or give a new --output-dir.")


def _changed(key: str, what: str, *, several: bool = False) -> str:
    verb, those, put = ("are", "those", "them") if several else ("is", "the one", "it")
    return f"{key}: the {what} {verb} not {those} this run began with. Put {put} back (a revision pins {put})."


# ---- What differs, in words ----


def _different(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return a line for every key that differs, by key."""
    return {
        name: f"{name}: {json.dumps(old.get(name))} before, {json.dumps(new.get(name))} now"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }


def _configurations(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if not old:
        return []
    lines = list(_different(_leaves(old), _leaves(new)).values())
    more = f", and {len(lines) - KEYS_NAMED} more" if len(lines) > KEYS_NAMED else ""
    return [
        f"{BASE}: config.json is not the one this run began with ({', '.join(lines[:KEYS_NAMED])}{more}). Put it back "
        "(a revision pins it)."
    ] * bool(lines)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a configuration by dotted key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in NOT_LEARNED:
            continue
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _tokenizers(old: RunIdentity, new: RunIdentity) -> list[str]:
    names = [
        name for name in sorted({*old.tokenizer, *new.tokenizer}) if old.tokenizer.get(name) != new.tokenizer.get(name)
    ]
    return [
        f"{BASE}: the tokenizer is not the one this run began with (another {', '.join(names)}). Put it back "
        "(a revision pins it)."
    ] * bool(old.tokenizer and names)


def _special_tokens(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    lines = _different(old, new).values() if old else ()
    return [
        f"{BASE}: the tokenizer's special tokens are not those this run began with ({', '.join(lines)}). Put them back "
        "(a revision pins them)."
    ] * bool(lines)


def _templates(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Compare the templates that a run used; ``new`` may have more, which are not known to be used."""
    found = []
    for name, sha256 in old.items():
        if new.get(name) != sha256:
            own = name == "chat"
            what = "tokenizer's chat template" if own else f"template {name}"
            put = "Put it back (a revision pins it)." if own else "Put it back."
            found.append(f"{TEMPLATE}: the {what} is not the one this run began with. {put}")
    return found


def _same_libraries(old: RunIdentity, new: RunIdentity) -> bool:
    return all(old.versions.get(name) == new.versions.get(name) for name in ("tokenizers", "transformers"))
