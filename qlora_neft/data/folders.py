"""A folder of data and its splits: written by ``save_to_disk``, cloned from the Hub, or simply full of files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserInputError
from ..files import read_yaml
from ..paths import DATA_SUFFIXES

Splits = dict[str, list[Path]]

TRAIN = "train"
SAVED_SPLITS, SAVED = "dataset_dict.json", "state.json"  # of `datasets`, in what save_to_disk writes
# Files that lie beside rows and have the ending of a data file.
NOT_ROWS = {SAVED_SPLITS, SAVED, "dataset_info.json", "dataset_infos.json", "config.json"}
# Words in the names of files and folders that say which split they are, as `datasets` has them.
WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# README.md of a dataset on the Hub begins with YAML between two lines of dashes.
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
LONGEST_README = 2**20  # bytes
MOST_VALUES = 200_000  # of its YAML: some data sets describe hundreds of languages


def splits_of_folder(folder: Path, name: str | None, key: str) -> Splits:
    """Return the files of each split of a folder, in order.

    Args:
        folder: An existing folder.
        name: Which configuration of a cloned dataset; None for its default.
        key: The name the caller wrote for the folder, for messages.

    Raises:
        UserInputError: If it holds no files of rows, or no such configuration.
    """
    saved = _saved(folder, key)
    configurations = {} if saved else _configurations(folder)
    if name is not None and name not in configurations:
        known = f"It has {', '.join(configurations)}." if configurations else "It has none."
        raise UserInputError(f"data.name: {name!r} is no configuration of {str(folder)!r}. {known}")
    found = saved or (_configured(folder, configurations, name, key) if configurations else _by_names(folder))
    if not any(found.values()):
        kinds = ", ".join(DATA_SUFFIXES[:5])
        raise UserInputError(
            f"{key}: the folder {str(folder)!r} holds no files of rows ({kinds}; those of text may be compressed). "
            "Name a folder that does, or a file."
        )
    return {split: files for split, files in found.items() if files}


# ---- Written by save_to_disk ----


def _saved(folder: Path, key: str) -> Splits | None:
    """Return the splits of a folder that ``save_to_disk`` wrote, None of another."""
    several = _json(folder / SAVED_SPLITS)
    if isinstance(several, Mapping) and isinstance(several.get("splits"), list):
        return {str(split): _saved_files(folder / str(split), key) for split in several["splits"]}
    one = _json(folder / SAVED)
    is_saved = isinstance(one, Mapping) and "_data_files" in one
    return {TRAIN: _saved_files(folder, key)} if is_saved else None


def _saved_files(folder: Path, key: str) -> list[Path]:
    state = _json(folder / SAVED)
    entries = state.get("_data_files") if isinstance(state, Mapping) else None
    names = [entry.get("filename") for entry in entries if isinstance(entry, Mapping)] if entries else []
    files = [folder / Path(name).name for name in names if isinstance(name, str)]
    missing = next((file for file in files if not file.is_file()), None)
    if not isinstance(entries, list) or missing is not None:
        what = repr(missing.name) if missing is not None else repr(SAVED)
        raise UserInputError(
            f"{key}: {str(folder)!r} was written by save_to_disk and is not whole: {what} is missing or damaged. "
            "Write it again."
        )
    return files


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


# ---- Cloned from the Hub ----


def _configurations(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return the configurations that a dataset's README declares, by name."""
    try:
        with (folder / "README.md").open("rb") as stream:
            text = stream.read(LONGEST_README).decode("utf-8", errors="replace")
    except OSError:
        return {}
    found = FRONT_MATTER.match(text.replace("\r\n", "\n"))
    try:
        stated = read_yaml(found[1], MOST_VALUES) if found else None
    except (yaml.YAMLError, RecursionError):
        return {}
    listed = stated.get("configs") if isinstance(stated, Mapping) else None
    if not isinstance(listed, list):
        return {}
    return {str(one.get("config_name", "default")): one for one in listed if isinstance(one, Mapping)}


def _configured(folder: Path, configurations: Mapping[str, Mapping[str, Any]], name: str | None, key: str) -> Splits:
    if name is None:
        default = [known for known, one in configurations.items() if one.get("default") or known == "default"]
        if not default and len(configurations) > 1:
            known = ", ".join(configurations)
            raise UserInputError(
                f"{key}: {str(folder)!r} comes in several configurations. Name one with data.name: {known}."
            )
        name = default[0] if default else next(iter(configurations))
    chosen = configurations[name]
    inside = folder / str(chosen.get("data_dir") or "")
    stated = chosen.get("data_files")
    if stated is None:
        return _by_names(inside) if _is_inside(inside, folder) else {}
    if isinstance(stated, str) or (isinstance(stated, list) and all(isinstance(one, str) for one in stated)):
        stated = [{"split": TRAIN, "path": stated}]
    splits: Splits = {}
    for one in stated if isinstance(stated, list) else []:
        if isinstance(one, Mapping):
            patterns = one.get("path")
            found = _globbed(inside, [patterns] if isinstance(patterns, str) else patterns or [], folder)
            splits.setdefault(str(one.get("split", TRAIN)), []).extend(found)
    return splits


def _globbed(folder: Path, patterns: Sequence[Any], root: Path) -> Iterator[Path]:
    for pattern in patterns:
        # Neither upwards nor from the root of the disk: the README may be a stranger's.
        if isinstance(pattern, str) and pattern and not Path(pattern).is_absolute() and ".." not in Path(pattern).parts:
            exact = folder / pattern
            found = [exact] if exact.is_file() else sorted(folder.glob(pattern))
            yield from (file for file in found if file.is_file() and _is_inside(file, root))


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


# ---- Full of files ----


def _by_names(folder: Path) -> Splits:
    """Return the files below a folder, by the split that their names tell; all are one split if no name tells any."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.name.lower().endswith(DATA_SUFFIXES)
        and file.name not in NOT_ROWS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    splits: Splits = {}
    for file in files:
        split = _split_of(file.relative_to(folder))
        if split is not None:
            splits.setdefault(split, []).append(file)
    told = [file for found in splits.values() for file in found]
    # A file whose name tells nothing beside others whose names do would be left out in silence.
    splits.setdefault(TRAIN, []).extend(file for file in files if file not in told)
    return splits if splits[TRAIN] else {split: found for split, found in splits.items() if found}


def _split_of(path: Path) -> str | None:
    # The file's own name says more than its folders'.
    for part in reversed(path.parts):
        words = re.split(r"[^a-z]+", part.lower())
        found = next((split for split, names in WORDS.items() if any(name in words for name in names)), None)
        if found:
            return found
    return None
