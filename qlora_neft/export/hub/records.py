"""All that the files of a run say of an adapter, gathered; for a checkpoint, up to its step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...adapter.folder import AdapterFolder
from ...errors import UserInputError
from ...files import read_json_lines, read_record
from ...paths import DATA_SUFFIXES, JINJA_SUFFIXES, kind_of

MEANS = {
    "neftune_norm": "measured_norm",
    "neftune_expected_norm": "expected_norm",
    "neftune_noise_to_embedding": "noise_to_embedding",
}


@dataclass(frozen=True)
class Records:
    """What is known of a training.

    Attributes:
        facts: ``summary.json``; of a checkpoint what it and its run's ``run.json`` say under the same names.
        log: Log entries with ``step``, oldest first.
        step: The optimizer step of a checkpoint, None for a finished run.
    """

    facts: dict[str, Any]
    log: list[dict[str, Any]]
    step: int | None = None

    def noise(self) -> dict[str, float]:
        """Means over the logged steps of what the noise measured."""
        found = {}
        for key, name in MEANS.items():
            values = [entry[key] for entry in self.log if entry.get(key) is not None]
            if values:
                found[name] = sum(values) / len(values)
        return found


def read_records(folder: AdapterFolder) -> Records:
    """Read the records beside an adapter; empty where another program trained it.

    Raises:
        UserInputError: If one of them cannot be read.
    """
    state = folder.path / "trainer_state.json"
    if folder.summary is None and state.is_file():
        return _of_checkpoint(folder, read_record(state))
    path = folder.path / "metrics.jsonl"
    return Records(folder.summary or {}, _read_lines(path) if path.is_file() else [])


def _of_checkpoint(folder: AdapterFolder, state: dict[str, Any]) -> Records:
    log, step = state.get("log_history", []), state.get("global_step")
    progress, run = (
        read_record(path) if path.is_file() else {}
        for path in (folder.path / "progress.json", folder.path.parent / "run.json")
    )
    facts: dict[str, Any] = {
        "steps": step,
        "recipe": folder.recipe.to_dict() if folder.recipe else None,
        "base_sha256": run.get("base_sha256"),
    }
    facts |= {key: progress.get(key) for key in ("tokens_seen", "trained_tokens_seen", "bad_steps", "train_seconds")}
    before = run.get("before") or {}
    facts["before"] = {key: before.get(key) for key in ("clean_train_loss", "held_out_loss")}
    facts["latest"] = {
        name: {"step": entry["step"], "value": entry[key]}
        for key, name in (("clean_loss", "clean_train_loss"), ("eval_loss", "held_out_loss"))
        for entry in [next((e for e in reversed(log) if e.get(key) is not None), None)]
        if entry
    }
    report = folder.path.parent / "data_report.json"
    if report.is_file():
        facts["data"] = read_record(report)
    return Records(facts, log, step)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_json_lines(path)
    except (OSError, ValueError) as error:
        raise UserInputError(f"{path}: cannot be read ({error}).") from error


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
    return kind_of(path, suffixes=DATA_SUFFIXES) != "local"


def is_hub_id(path: str) -> bool:
    """Whether a path of data is a Hub id."""
    return kind_of(path, suffixes=DATA_SUFFIXES) == "hub"


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
