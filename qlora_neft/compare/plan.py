"""Which runs a sweep is made of. All of them are checked before one begins."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import RecipeError, UserInputError
from ..files import write_json
from ..recipe import Recipe, load_recipe
from .records import SWEEP_FILE, read_sweep

SEED = "train.seed"
_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "\"'"


@dataclass(frozen=True)
class SweptKey:
    """A key and the texts of its values."""

    key: str
    values: tuple[str, ...]


def split_words(words: Sequence[str]) -> tuple[list[SweptKey], list[str], list[str]]:
    """Tell swept keys from fixed overrides.

    Args:
        words: ``section.key=value`` each; several values with commas between them make it a swept key. A comma
            inside brackets, braces or quotes belongs to the value.

    Returns:
        Swept keys, fixed overrides, and one line per word that cannot be understood.
    """
    swept: list[SweptKey] = []
    fixed: list[str] = []
    problems: list[str] = []
    for word in words:
        key, _, text = word.partition("=")
        values = split_values(text)
        if len(values) == 1:
            fixed.append(word)
        elif key == SEED:
            problems.append(f"{word}: seeds are counted from one. Write {SEED}={values[0]} --seeds {len(values)}.")
        elif "." not in key:
            problems.append(f"{word}: a whole section cannot be swept. Name a key of it, such as neftune.noise_alpha.")
        elif not all(values):
            problems.append(f"{word}: a value is empty. Write the values with one comma between two.")
        elif key in {other.key for other in swept}:
            problems.append(f"{word}: {key} is swept twice. Name all its values in one word.")
        else:
            swept.append(SweptKey(key, tuple(values)))
    for key in swept:
        if any(word.partition("=")[0] == key.key for word in fixed):
            problems.append(f"{key.key}: is swept and given one value as well. Remove one of the two.")
    return swept, fixed, problems


def split_values(text: str) -> list[str]:
    """Split at the commas that are outside of brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES and not parts[-1].strip():
            quote = character  # inside a word, a quote is an apostrophe
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


MAX_SEED = 2**32 - 1
MAX_NAME = 60  # characters of the settings' part of a run's name


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: Its folder's, below the sweep's.
        settings: Swept keys and the texts of their values.
        seed: Of order, dropout, noise and LoRA's start.
        recipe: Resolved.
    """

    name: str
    settings: dict[str, str]
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class SweepPlan:
    """A sweep.

    Attributes:
        recipe: Name or path as given.
        swept: Swept keys.
        runs: One for each setting and seed; all settings of a seed come before the next seed.
    """

    recipe: str
    swept: tuple[SweptKey, ...]
    runs: tuple[PlannedRun, ...]

    @property
    def keys(self) -> list[str]:
        """Names of the swept keys."""
        return [key.key for key in self.swept]

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def to_dict(self) -> dict[str, Any]:
        """For ``sweep.json``."""
        runs = [
            {"name": run.name, "settings": run.settings, "seed": run.seed, "recipe": run.recipe.to_dict()}
            for run in self.runs
        ]
        swept = {key.key: list(key.values) for key in self.swept}
        return {"version": 1, "recipe": self.recipe, "swept": swept, "seeds": self.seeds, "runs": runs}


def plan_sweep(
    name: str, words: Sequence[str], *, seeds: int = 1, combine: Literal["grid", "list"] = "grid"
) -> SweepPlan:
    """Plan a sweep and check the recipe of every run.

    Args:
        name: A recipe's name or path.
        words: Swept keys and overrides, see `split_words`.
        seeds: Runs of each setting, their seeds counted from the recipe's.
        combine: ``grid`` for every combination of the swept keys' values, ``list`` for the first values of all keys,
            then the second, and so on.

    Raises:
        UserInputError: If the words make no sweep.
        RecipeError: With every problem of every run's recipe.
    """
    swept, fixed, problems = split_words(words)
    if problems:
        raise UserInputError("\n  ".join(["sweep: these words make no sweep:", *problems]))
    if not swept:
        raise UserInputError(
            "sweep: no key has several values. Write them with commas, for instance neftune.noise_alpha=0,5,10,15."
        )
    settings = _combined(swept, combine)
    first_seed = _first_seed(name, fixed, settings, seeds)
    runs, problems = [], []
    for seed in range(first_seed, first_seed + seeds):
        for setting in settings:
            try:
                recipe = load_recipe(name, [*fixed, *_words(setting), f"{SEED}={seed}"])
            except RecipeError as error:
                problems += [problem for problem in error.problems if problem not in problems]
                continue
            runs.append(_run(setting, seed, recipe, name, swept))
    if problems:
        raise RecipeError(problems, f"sweep of {name}")
    return SweepPlan(name, tuple(swept), tuple(_with_own_names(_without_repeats(runs))))


def _combined(swept: Sequence[SweptKey], combine: str) -> list[dict[str, str]]:
    keys = [key.key for key in swept]
    if combine == "grid":
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(key.values for key in swept))]
    counts = {key.key: len(key.values) for key in swept}
    if len(set(counts.values())) > 1:
        raise UserInputError(
            "--list: every swept key needs as many values as the others, got "
            + ", ".join(f"{key} {count}" for key, count in counts.items())
            + ". Add values, or leave --list away for every combination."
        )
    return [dict(zip(keys, values, strict=True)) for values in zip(*(key.values for key in swept), strict=True)]


def _first_seed(name: str, fixed: Sequence[str], settings: Sequence[dict[str, str]], seeds: int) -> int:
    """The recipe's own; 0 where its problems are told later."""
    try:
        first = load_recipe(name, [*fixed, *_words(settings[0])]).train.seed
    except RecipeError:
        return 0
    if first + seeds - 1 > MAX_SEED:
        raise UserInputError(f"--seeds: {seeds} seeds from {SEED} {first} exceed {MAX_SEED}. Begin with a smaller one.")
    return first


def _words(setting: dict[str, str]) -> list[str]:
    return [f"{key}={text}" for key, text in setting.items()]


def _run(setting: dict[str, str], seed: int, recipe: Recipe, source: str, swept: Sequence[SweptKey]) -> PlannedRun:
    short = [key.key.split(".")[-1] for key in swept]
    keys = {key.key: key.key.split(".")[-1] if short.count(key.key.split(".")[-1]) == 1 else key.key for key in swept}
    parts = "-".join(_plain(f"{keys[key]}_{text}") for key, text in setting.items())
    name = f"{parts[:MAX_NAME]}-seed_{seed}"
    mirror = recipe.machine.mirror_dir
    if mirror is not None:  # a mirror belongs to one run
        machine = recipe.machine.model_copy(update={"mirror_dir": str(Path(mirror) / name)})
        recipe = recipe.model_copy(update={"machine": machine})
    return PlannedRun(name, setting, seed, recipe)


def _plain(text: str) -> str:
    """Characters that every file system and shell takes as they are."""
    return re.sub(r"[^A-Za-z0-9.+_-]+", "_", text).strip("_.")


def _without_repeats(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Each run once: without noise, what kind of noise there would be makes no other run.

    Raises:
        UserInputError: If a value is named twice.
    """
    exact: dict[str, PlannedRun] = {}
    kept: dict[str, PlannedRun] = {}
    for run in runs:
        recipe = run.recipe.to_dict()
        recipe["machine"]["mirror_dir"] = None  # made from the run's name
        key = repr(recipe)
        if key in exact:
            pair = " and ".join(" ".join(_words(other.settings)) for other in (exact[key], run))
            raise UserInputError(f"sweep: {pair} are the same run. Name each value once.")
        exact[key] = run
        noise = recipe["neftune"]
        if noise is not None and not noise["noise_alpha"] and not noise["final_alpha"]:
            recipe["neftune"] = None
        kept.setdefault(repr(recipe), run)
    return list(kept.values())


def _with_own_names(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Runs whose settings read alike in a name get a number."""
    named: list[PlannedRun] = []
    for run in runs:
        name, taken = run.name, {other.name for other in named}
        number = 2
        while name.lower() in {other.lower() for other in taken}:
            name = f"{run.name}-{number}"
            number += 1
        named.append(PlannedRun(name, run.settings, run.seed, run.recipe))
    return named


def open_sweep(plan: SweepPlan, output_dir: Path, *, write: bool = True) -> list[str]:
    """Begin a sweep in a folder, or go on with it there.

    A sweep may grow: runs that are there already stay as they are, further values or seeds are added.

    Args:
        plan: All its runs.
        output_dir: A new or empty folder, or this sweep's.
        write: Whether to note the plan, and the recipe of every run in ``recipes/``; else it is only compared.

    Returns:
        Names of the runs that an earlier plan did not have; all of them in a new folder.

    Raises:
        UserInputError: If the folder holds anything else, or a sweep that has other runs (the difference is shown).
    """
    earlier = read_sweep(output_dir) if output_dir.is_dir() else None
    if earlier is None and output_dir.exists():
        _check_empty(output_dir)
    before = {run["name"]: run for run in (earlier or {}).get("runs", [])}
    now = plan.to_dict()
    _check_same(before, {run["name"]: run for run in now["runs"]}, output_dir)
    if write:
        (output_dir / "recipes").mkdir(parents=True, exist_ok=True)
        for run in plan.runs:
            recipe_of(output_dir, run.name).write_text(run.recipe.to_yaml(), encoding="utf-8")
        write_json(output_dir / SWEEP_FILE, now)
    return [run.name for run in plan.runs if run.name not in before]


def recipe_of(output_dir: Path, name: str) -> Path:
    """The recipe that a run is trained from; later changes to the user's own file do not reach it."""
    return output_dir / "recipes" / f"{name}.yaml"


def _check_empty(output_dir: Path) -> None:
    if not output_dir.is_dir():
        raise UserInputError(f"--output-dir: {str(output_dir)!r} is a file. Give a new folder.")
    if any(not path.name.startswith(".") for path in output_dir.iterdir()):
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} is not empty and holds no sweep. Nothing in it may be lost: give a new "
            "folder."
        )


def _check_same(before: dict[str, Any], now: dict[str, Any], output_dir: Path) -> None:
    lines = [f"  {name}: not in this sweep now" for name in before if name not in now]
    for name in before.keys() & now.keys():
        old, new = _learned(before[name]["recipe"]), _learned(now[name]["recipe"])
        for key in sorted({*old, *new}):
            line = f"  {key}: {json.dumps(old.get(key))} before, {json.dumps(new.get(key))} now"
            if old.get(key) != new.get(key) and line not in lines:
                lines.append(line)
    if lines:
        raise UserInputError(
            f"--output-dir: {str(output_dir)!r} holds another sweep:\n" + "\n".join(lines) + "\n"
            "Values and seeds may be added, the machine section may change, nothing else. Give the same sweep, or a "
            "new --output-dir."
        )


def _learned(recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, keys in recipe.items()
        if section != "machine"
        for key, value in (keys or {}).items()
    }
