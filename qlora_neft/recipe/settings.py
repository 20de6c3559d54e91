"""Flatten a recipe to ``section.key`` and value, and pick the part that decides what is learned.

The functions take plain mappings, so that they serve for recorded recipes too: what an older or newer version wrote is
compared as it was written, unknown keys included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def learned(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the trained weights as ``section.key`` to value: two runs equal in it learn the same."""
    settings = without_silent_noise(flat(recipe))
    return {key: value for key, value in settings.items() if key not in NOT_LEARNED and not key.startswith("machine.")}
