"""Flatten a recipe to ``section.key`` and value, and pick the part that decides what is learned.

The functions take plain mappings, so that they serve for recorded recipes too: what an older or newer version wrote is
compared as it was written, unknown keys included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..paths import JINJA_SUFFIXES

# Keys outside the machine section that change no weight: what is measured, and what is refused.
NOT_LEARNED = frozenset(
    {
        "data.eval_path",
        "data.eval_split",
        "data.max_dropped_fraction",
        "data.max_truncated_fraction",
        "data.max_duplicate_fraction",
        "quantization.min_nf4_share",
        "train.max_bad_steps",
    }
)

# Keys that earlier versions did not have, each with the value by which a run is as it was without it.
AS_BEFORE = {
    "data.split_text": False,
    "train.loss_mean": "tokens",
    "neftune.symmetric": False,
    "lora.use_rslora": False,
    "train.loraplus_lr_ratio": None,
}

# What judges by held-out rows which weights are the result; without the first two, or with these values, nothing does.
SELECTION_OFF = {"train.keep": "last", "train.early_stopping_patience": None}
SELECTION = frozenset({*SELECTION_OFF, "train.selection_steps", "train.early_stopping_threshold"})
HELD_OUT = frozenset({"data.eval_path", "data.eval_split"})

# Keys that say where content is found, which is compared by itself. Templates of this package are no places.
PLACES = frozenset({"model.name_or_path", "model.revision", "model.adapter", "model.adapter_revision"})
_PLACES_OF_DATA = frozenset({"path", "revision", "eval_path"})


def flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return every key of a recipe as ``section.key`` to value; an absent section has none."""
    return {
        f"{section}.{key}": value
        for section, keys in recipe.items()
        if isinstance(keys, Mapping)
        for key, value in keys.items()
    }


def without_silent_noise(settings: dict[str, Any]) -> dict[str, Any]:
    """Drop the noise keys where alpha is 0 throughout: that is the same run as one without the section."""
    # A schedule may begin at 0 and still make noise.
    if settings.get("neftune.noise_alpha") or settings.get("neftune.final_alpha"):
        return settings
    return {key: value for key, value in settings.items() if not key.startswith("neftune.")}


def selects(settings: Mapping[str, Any]) -> bool:
    """Return whether held-out rows decide which weights are the result, from a recipe's flat settings."""
    return any(settings.get(key, off) != off for key, off in SELECTION_OFF.items())


def prompt_loss_weight(data: Mapping[str, Any]) -> float:
    """Return the weight of a token outside responses, from the keys of a data section: three spellings of one thing."""
    stated = data.get("prompt_loss_weight")
    if stated is not None:
        return float(stated)
    return 1.0 if data.get("train_on") == "all" or data.get("train_on_prompt") else 0.0


def with_one_prompt_weight(settings: dict[str, Any]) -> dict[str, Any]:
    """Spell the weight of prompts in one way: a run is the same however its recipe says it."""
    names = ("train_on", "prompt_loss_weight", "train_on_prompt")
    data = {name: settings[f"data.{name}"] for name in names if f"data.{name}" in settings}
    if not data:
        return settings
    # With prompts at weight 1 every response has it too, so that `all` says no more than its weight.
    train_on = "responses" if data.get("train_on") in (None, "all") else data["train_on"]
    others = {key: value for key, value in settings.items() if key.removeprefix("data.") not in data}
    return {**others, "data.train_on": train_on, "data.prompt_loss_weight": prompt_loss_weight(data)}


def with_one_rate(settings: dict[str, Any]) -> dict[str, Any]:
    """Spell one learning rate for A and B in one way: a ratio of 1 is none."""
    if settings.get("train.loraplus_lr_ratio") != 1:
        return settings
    return {**settings, "train.loraplus_lr_ratio": None}


def learned(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the trained weights as ``section.key`` to value: two runs equal in it learn the same."""
    settings = with_one_rate(with_one_prompt_weight(without_silent_noise(flat(recipe))))
    # Held-out rows only measure, unless a selection goes by them.
    ignored = NOT_LEARNED - HELD_OUT if selects(settings) else NOT_LEARNED | SELECTION
    return {
        key: value
        for key, value in settings.items()
        if key not in ignored and not key.startswith("machine.") and AS_BEFORE.get(key, ...) != value
    }


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as `learned` gives them without what only says where base, adapter, rows and templates lie."""
    found = {key: value for key, value in settings.items() if key not in PLACES}
    found["model.adapter"] = settings.get("model.adapter") is not None  # to begin anew is another thing to learn
    data = {key.removeprefix("data."): value for key, value in found.items() if key.startswith("data.")}
    found = {key: value for key, value in found.items() if not key.startswith("data.")}
    found |= {f"data.{key}": value for key, value in _placeless(data).items()}
    mixture = found.get("data.mixture")
    if isinstance(mixture, list):
        found["data.mixture"] = [_placeless(one) if isinstance(one, Mapping) else one for one in mixture]
    return found


def _placeless(source: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in source.items() if key not in _PLACES_OF_DATA}
    template = found.get("prompt_template")
    if isinstance(template, str) and template.endswith(JINJA_SUFFIXES):
        found["prompt_template"] = "a file"
    return found
