"""The runs that make up a sweep, and the measures taken of them, all checked before the first run begins. No torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import RecipeError, UserInputError
from ..evaluation.overlap import check_installed
from ..recipe import Recipe, load_recipe
from .decide import BY_HELD_OUT_LOSS, Decision

SEED = "train.seed"
MAX_SEED = 2**32 - 1  # NumPy's limit
MAX_NAME = 60  # characters that the settings take in a run's name

MEASURES = ("rows", "answers", "loss", "overfit", "text", "alpaca")  # taken by the functions of `measures.MEASURES`
ON_HELD_OUT_ROWS = ("rows", "answers")
HELD_OUT_SHARE = 0.05  # of the rows, where the recipe holds out none and they are needed
EVAL_KEYS = ("data.eval_path", "data.eval_split", "data.eval_fraction")

_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "\"'"


@dataclass(frozen=True)
class SweptKey:
    """A key of the recipe and its values as the user wrote them."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: Name of its folder, inside the sweep's.
        settings: Swept keys and their values as the user wrote them.
        seed: Seed of data order, dropout, noise and the initial LoRA weights.
        recipe: The run's resolved recipe.
    """

    name: str
    settings: dict[str, str]
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class SweepPlan:
    """A sweep.

    Attributes:
        recipe: Name or path of the recipe, as given.
        swept: Swept keys.
        runs: One run for each setting and seed; all settings of one seed come before the next seed.
        decision: What decides which arm is best.
    """

    recipe: str
    swept: tuple[SweptKey, ...]
    runs: tuple[PlannedRun, ...]
    decision: Decision = BY_HELD_OUT_LOSS

    @property
    def holds_out(self) -> bool:
        """Whether every run has held-out rows."""
        return all(run.recipe.data.has_eval_rows for run in self.runs)

    @property
    def keys(self) -> list[str]:
        """Names of the swept keys."""
        return [key.key for key in self.swept]

    @property
    def seeds(self) -> list[int]:
        """Seeds in order."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``sweep.json``."""
        runs = [
            {"name": run.name, "settings": run.settings, "seed": run.seed, "recipe": run.recipe.to_dict()}
            for run in self.runs
        ]
        swept = {key.key: list(key.values) for key in self.swept}
        decides = self.decision.to_dict()
        return {
            "version": 1,
            "recipe": self.recipe,
            "swept": swept,
            "seeds": self.seeds,
            "decides": decides,
            "runs": runs,
        }


def plan_sweep(
    name: str,
    words: Sequence[str],
    *,
    seeds: int = 1,
    combine: Literal["grid", "list"] = "grid",
    decision: Decision = BY_HELD_OUT_LOSS,
) -> SweepPlan:
    """Plan a sweep and check the recipe of every run.

    Args:
        name: A recipe's name or path.
        words: Swept keys and overrides, see `split_words`.
        seeds: Runs of each setting, their seeds counted up from the recipe's.
        combine: ``grid`` for every combination of the swept keys' values, ``list`` for the first values of all keys,
            then the second, and so on.
        decision: What decides which arm is best.

    Raises:
        UserInputError: If the words do not make a sweep.
        RecipeError: With every problem of every run's recipe.
    """
    swept, fixed, problems = split_words(words)
    if problems:
        raise UserInputError("\n  ".join(["sweep: these words do not make a sweep:", *problems]))
    if not swept:
        raise UserInputError(
            "sweep: no key has several values. Separate them by commas, for instance neftune.noise_alpha=0,5,10,15."
        )
    settings = _combined(swept, combine)
    first_seed = _first_seed(name, fixed, settings, seeds)
    runs, problems = [], []
    # Seeds outside: a sweep cut short has compared every setting on the first seeds, and pairs need both sides.
    for seed in range(first_seed, first_seed + seeds):
        for setting in settings:
            try:
                recipe = load_recipe(name, [*fixed, *_words(setting), f"{SEED}={seed}"])
            except RecipeError as error:
                # Runs share most of their problems: each is told once.
                problems += [problem for problem in error.problems if problem not in problems]
                continue
            runs.append(_planned(setting, seed, recipe, swept))
    if problems:
        raise RecipeError(problems, f"sweep of {name}")
    return SweepPlan(name, tuple(swept), tuple(_with_own_names(_without_repeats(runs))), decision)


def check_measures(names: Sequence[str]) -> None:
    """Refuse a name that is not a measure, or a measure whose libraries are not installed.

    Raises:
        UserInputError: If there is one.
    """
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise UserInputError(
            f"--measure: must be names from {', '.join(MEASURES)}, separated by commas, got {', '.join(unknown)}."
        )
    if "overfit" in names:  # better now than after the first run has trained
        check_installed()


def needs_held_out(measures: Sequence[str], decision: Decision, *, asks_them: bool = False) -> list[str]:
    """Return what of a sweep needs held-out rows: measures, and what decides.

    Args:
        measures: Names of the measures.
        decision: What decides which arm is best.
        asks_them: Whether the prompts of held-out rows are asked.
    """
    found = [name for name in measures if name in ON_HELD_OUT_ROWS or (asks_them and name in ("text", "alpaca"))]
    return found + ([decision.by] if decision.is_on_held_out_rows else [])


def names_held_out(words: Sequence[str]) -> bool:
    """Whether a user's own words say which rows are held out, or that none are."""
    return any(word.partition("=")[0] in EVAL_KEYS for word in words)


def check_held_out(measures: Sequence[str], plan: SweepPlan, *, asks_them: bool = False) -> None:
    """Refuse measures on held-out rows if a run's recipe has none.

    Raises:
        UserInputError: If there is such a run.
    """
    wanting = [name for name in needs_held_out(measures, plan.decision, asks_them=asks_them) if name in measures]
    if wanting and not plan.holds_out:
        raise UserInputError(
            f"--measure: {', '.join(wanting)} needs held-out rows. Give data.eval_path, data.eval_split or "
            f"data.eval_fraction, or omit {', '.join(wanting)}."
        )


# ---- The words of the command line ----


def split_words(words: Sequence[str]) -> tuple[list[SweptKey], list[str], list[str]]:
    """Tell swept keys from fixed overrides.

    Args:
        words: ``section.key=value`` each; several values separated by commas make it a swept key. A comma inside
            brackets, braces or quotes belongs to the value.

    Returns:
        Swept keys, fixed overrides, and one line per word that cannot be understood.
    """
    swept: list[SweptKey] = []
    fixed: list[str] = []
    problems: list[str] = []
    for word in words:
        key, _, text = word.partition("=")  # a word without "=" has one value and is refused with the overrides
        values = split_values(text)
        if len(values) == 1:
            fixed.append(word)
        elif key == SEED:
            problems.append(
                f"{word}: seeds are counted up from one. Write {SEED}={values[0]} --seeds {len(values)} instead."
            )
        elif "." not in key:
            problems.append(f"{word}: a whole section cannot be swept. Name one of its keys: neftune.noise_alpha.")
        elif not all(values):
            problems.append(f"{word}: a value is empty. Put one comma between two values.")
        elif key in {other.key for other in swept}:
            problems.append(f"{word}: {key} is swept twice. Put all its values in one word.")
        else:
            swept.append(SweptKey(key, tuple(values)))
    for key in swept:
        if any(word.partition("=")[0] == key.key for word in fixed):
            problems.append(f"{key.key}: is swept and set to a single value as well. Remove one of the two.")
    return swept, fixed, problems


def split_values(text: str) -> list[str]:
    """Split at the commas outside brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES and not parts[-1].strip():
            quote = character  # only at the start of a value: inside a word it is an apostrophe
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _words(setting: dict[str, str]) -> list[str]:
    return [f"{key}={text}" for key, text in setting.items()]


# ---- Settings and seeds ----


def _combined(swept: Sequence[SweptKey], combine: str) -> list[dict[str, str]]:
    keys = [key.key for key in swept]
    if combine == "grid":
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(key.values for key in swept))]
    counts = {key.key: len(key.values) for key in swept}
    if len(set(counts.values())) > 1:
        raise UserInputError(
            "--list: all swept keys must have the same number of values, got "
            + ", ".join(f"{key} {count}" for key, count in counts.items())
            + ". Add values, or omit --list to run every combination."
        )
    return [dict(zip(keys, values, strict=True)) for values in zip(*(key.values for key in swept), strict=True)]


def _first_seed(name: str, fixed: Sequence[str], settings: Sequence[dict[str, str]], seeds: int) -> int:
    """Return the recipe's seed; 0 if the recipe has problems, which are reported later with those of all runs."""
    try:
        first = load_recipe(name, [*fixed, *_words(settings[0])]).train.seed
    except RecipeError:
        return 0
    if first + seeds - 1 > MAX_SEED:
        raise UserInputError(f"--seeds: {seeds} seeds from {SEED} {first} exceed {MAX_SEED}. Start from a smaller one.")
    return first


# ---- Runs and their names ----


def _planned(setting: dict[str, str], seed: int, recipe: Recipe, swept: Sequence[SweptKey]) -> PlannedRun:
    last = [key.key.split(".")[-1] for key in swept]
    # A key goes by its last part, unless two swept keys end alike.
    short = {key.key: end if last.count(end) == 1 else key.key for key, end in zip(swept, last, strict=True)}
    # Setting and seed are in the name, so that a folder tells what it holds.
    parts = "-".join(_plain(f"{short[key]}_{text}") for key, text in setting.items())
    name = f"{parts[:MAX_NAME]}-seed_{seed}"  # cut before the seed, which must stay; see _with_own_names
    mirror = recipe.machine.mirror_dir
    if mirror is not None:  # a mirror belongs to one run
        machine = recipe.machine.model_copy(update={"mirror_dir": str(Path(mirror) / name)})
        recipe = recipe.model_copy(update={"machine": machine})
    return PlannedRun(name, setting, seed, recipe)


def _plain(text: str) -> str:
    """Keep only characters that every file system and shell takes literally."""
    return re.sub(r"[^A-Za-z0-9.+_-]+", "_", text).strip("_.")


def _without_repeats(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Drop runs without noise that differ only in the kind of noise they do not add.

    Raises:
        UserInputError: If a value is named twice.
    """
    # `exact` finds values named twice, a mistake; `kept` runs that train alike only because they add no noise.
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
        # Without noise its kind is moot: a grid over kinds of noise holds such a run once for each.
        noise = recipe["neftune"]
        if noise is not None and not noise["noise_alpha"] and not noise["final_alpha"]:
            recipe["neftune"] = None
        kept.setdefault(repr(recipe), run)
    return list(kept.values())


def _with_own_names(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Number the runs whose names would be the same, also on file systems that ignore case."""
    named: list[PlannedRun] = []
    taken: set[str] = set()
    for run in runs:
        name, number = run.name, 2
        while name.lower() in taken:
            name = f"{run.name}-{number}"
            number += 1
        taken.add(name.lower())
        named.append(replace(run, name=name))
    return named
