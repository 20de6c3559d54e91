"""``training_summary.json``: what a training was and came to, without anything of the machine but its hardware."""

from __future__ import annotations

from typing import Any

from ..files.suffixes import JINJA_SUFFIXES
from .public_recipe import TEMPLATE_FILE, is_hub_id, local_names, public_path
from .records import Records

SUMMARY_VERSION = 1
NOISE_RULE = "alpha / sqrt(L * d) times noise, L: each sequence's own number of tokens, d: embedding width"
COPIED = (
    "seed",
    "steps",
    "tokens_seen",
    "trained_tokens_seen",
    "bad_steps",
    "parameters",
    "lora_parameters",
    "base_sha256",
    "base_unchanged",
    "train_seconds",
    "before",
    "after",
    "latest",
)
COUNTS = ("rows", "tokens", "trained_tokens", "truncated", "dropped", "duplicates", "lengths", "sha256")
SOURCE_KEYS = ("path", "rows", "format", "prompt_template", "weight", "end")


def training_summary(
    records: Records, recipe: dict[str, Any] | None, base: tuple[str, str | None], weights: dict[str, Any]
) -> dict[str, Any]:
    """The summary that is published; whatever is not on record is left out.

    Args:
        records: Of the run.
        recipe: As it was run, with this machine's paths, None if there is none.
        base: Hub id of the base and its commit.
        weights: ``dtype`` of the published adapter, and ``trained_dtype``.
    """
    facts = records.facts
    summary: dict[str, Any] = {
        "summary_version": SUMMARY_VERSION,
        "status": "done" if facts and records.step is None else None,
        "checkpoint_step": records.step,
        "base": {"id": base[0], "revision": base[1]},
        "adapter": weights,
        "quantization": (recipe or {}).get("quantization"),
        "neftune": _noise(records, recipe),
        "data": _data(facts.get("data"), recipe),
        **{key: facts.get(key) for key in COPIED},
        "precision": facts.get("precision"),
        "hardware": _hardware(facts),
        "peak_memory": facts.get("peak_memory"),
        "versions": facts.get("versions"),
    }
    return {key: value for key, value in summary.items() if value not in (None, {}, [])}


def _noise(records: Records, recipe: dict[str, Any] | None) -> dict[str, Any] | None:
    noise = (recipe or {}).get("neftune")
    if recipe is None:
        return None
    if not noise or not (noise.get("noise_alpha") or noise.get("final_alpha")):
        return {"noise_alpha": 0.0}
    return {**noise, "rule": NOISE_RULE, **records.noise()}


def _data(data: dict[str, Any] | None, recipe: dict[str, Any] | None) -> dict[str, Any] | None:
    if not data:
        return None
    names = local_names(recipe)
    return {
        **{part: _counts(data.get(part)) for part in ("train", "eval") if data.get(part)},
        "sources": [_source(source) for source in data.get("sources", [])],
        "warnings": [_without_paths(warning, names) for warning in data.get("warnings", [])],
    }


def _counts(part: dict[str, Any]) -> dict[str, Any]:
    return {key: part[key] for key in COUNTS if key in part}


def _source(source: dict[str, Any]) -> dict[str, Any]:
    kept = {key: source[key] for key in SOURCE_KEYS if key in source}
    if str(kept.get("prompt_template", "")).endswith(JINJA_SUFFIXES):
        kept["prompt_template"] = TEMPLATE_FILE
    return {**kept, "path": public_path(source["path"]), "on_hub": is_hub_id(source["path"])}


def _without_paths(line: str, names: dict[str, str]) -> str:
    for path, public in names.items():
        line = line.replace(path, public)
    return line


def _hardware(facts: dict[str, Any]) -> dict[str, Any] | None:
    """Kind and name of the device; the system's version and number of threads are nobody's business."""
    hardware = facts.get("hardware") or {}
    return {key: hardware[key] for key in ("device", "name") if key in hardware}
