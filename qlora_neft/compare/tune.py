"""The search for a learning rate: short runs that differ in nothing else, extended while the best is at an end.

It is a sweep over ``train.learning_rate`` in a folder of its own, of runs cut short by ``train.max_steps``: the
schedule spans the steps there are, so each run has the recipe's own, compressed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError, UserInputError
from ..recipe import Recipe, load_recipe
from ..recipe.load import recipe_dir
from ..recipe.override_files import expanded
from ..recipe.train import SELECTION_STEPS, SELECTION_THRESHOLD
from ..runner.run import run
from .folder import is_begun, is_trained, open_sweep
from .plan import HELD_OUT_SHARE, SweepPlan, names_held_out, plan_sweep
from .queue import Runner
from .rates import beyond, grid, text_of
from .records import read_sweep
from .results_file import DryRun, DryRunEntry, TuneResults
from .sweep import Display, held, train_missing
from .tune_results import points_of, results_of, write_files

RATE = "train.learning_rate"
STEPS = 50  # of each run, unless the recipe's own has fewer
MEASURES = ("rows",)  # the exact loss without noise, of every held-out row
# Nothing may choose among a run's weights: arms would then differ in more than the rate.
SELECTION_OFF = (
    "train.keep=last",
    "train.early_stopping_patience=null",
    f"train.selection_steps={SELECTION_STEPS}",
    f"train.early_stopping_threshold={SELECTION_THRESHOLD}",
)
# What costs time and decides nothing here; evaluation before the first step and after the last stays.
BARE = ("machine.eval_answers=0", "machine.clean_loss_steps=0", "machine.eval_steps=1000000", "machine.push_to=null")


@dataclass(frozen=True)
class Search:
    """A search, checked.

    Attributes:
        name: The recipe's name or path, as given.
        words: The user's overrides, without the rate; they belong to the copy of the recipe too.
        added: Overrides of the search alone.
        own: The recipe's rate.
        rates: Those to begin with, ascending.
        extends: Whether further ones may be tried beyond an end.
        steps: Of each run.
        full_steps: Of the recipe's own run.
        tokens: Estimate for one run, from the mean length of the rows.
        seeds: Runs of each rate.
        notes: What was decided, a line each.
    """

    name: str
    words: tuple[str, ...]
    added: tuple[str, ...]
    own: float
    rates: tuple[float, ...]
    extends: bool
    steps: int
    full_steps: int
    tokens: int
    seeds: int
    notes: tuple[str, ...]

    def plan(self, rates: Sequence[float]) -> SweepPlan:
        """Plan the runs of some rates."""
        return _plan((self.name, [*self.words, *self.added]), rates, self.seeds)

    @property
    def budget(self) -> str:
        """The line that is shown before the first run begins."""
        runs = len(self.rates) * self.seeds
        share = runs * self.steps / self.full_steps
        more = f"; up to {3 * self.seeds} runs more while the lowest loss is at an end" if self.extends else ""
        return (
            f"budget: {len(self.rates)} rates x {self.seeds} seed{'s' * (self.seeds > 1)} x {self.steps} steps, about "
            f"{runs * self.tokens:,} tokens: {share:.2g} times the recipe's own run of {self.full_steps} steps{more}"
        )


def plan_search(
    name: str, words: Sequence[str], output_dir: Path, *, rates: Sequence[float] | None, steps: int | None, seeds: int
) -> Search:
    """Plan a search: check the recipe, count its steps and tokens, and hold out rows if the recipe holds out none.

    Args:
        name: A recipe's name or path.
        words: Overrides.
        output_dir: The search's folder, read only.
        rates: Those to try; None for a grid around the recipe's own, which may be extended.
        steps: Of each run; None for `STEPS`, and at most the recipe's own.
        seeds: Runs of each rate.

    Raises:
        UserInputError: If the recipe, its data or a word is wrong.
    """
    given = _checked_words(name, words)
    recipe, notes = _without_selection(name, given)
    own, kept = recipe.train.learning_rate, [word for word in given if word.partition("=")[0] != RATE]
    added = [*SELECTION_OFF, *BARE]
    if recipe.machine.push_every != 1:
        added.append("machine.push_every=1")
    if not recipe.data.has_eval_rows:
        added.append(_share_held_out(given))
        notes.append(
            f"held out: {HELD_OUT_SHARE:.0%} of the rows (data.eval_fraction={HELD_OUT_SHARE}) for the search alone, "
            "as the recipe has none: the same rows in every run, trained on in none"
        )
    full, rows = _whole_run(name, [*given, *added], output_dir)
    short = min(steps or STEPS, full)
    if steps is not None and steps > full:
        notes.append(f"--steps: the recipe's own run has {full}, so {full} it is, got {steps}")
    added.append(f"train.max_steps={short}")
    warmup = recipe.train.warmup_steps
    if warmup >= 1:  # a share below 1 shrinks by itself
        added.append(f"train.warmup_steps={max(round(warmup * short / full), 1)}")
    tokens = round(rows["tokens"] / max(rows["rows"], 1) * short * recipe.train.effective_batch_size)
    to_try = tuple(sorted(rates)) if rates else tuple(grid(own))
    search = Search(name, tuple(kept), tuple(added), own, to_try, not rates, short, full, tokens, seeds, tuple(notes))
    search.plan(to_try)
    return search


def _checked_words(name: str, words: Sequence[str]) -> list[str]:
    """Return the overrides, those of files among them; several rates are refused."""
    given, unread = expanded(words, recipe_dir())
    if unread:
        raise RecipeError(unread, name)
    if any(word.partition("=")[0] == RATE and "," in word for word in given):
        raise UserInputError(f"{RATE}: one rate, the middle of the search. Name those to try with --rates.")
    return given


def _share_held_out(words: Sequence[str]) -> str:
    """Return the override that holds out rows for the search."""
    if names_held_out(words):
        raise UserInputError(
            "tune: needs held-out rows, whose loss decides, and these overrides hold out none. Leave "
            "data.eval_fraction to the search, or give data.eval_path."
        )
    return f"data.eval_fraction={HELD_OUT_SHARE}"


def _whole_run(name: str, words: Sequence[str], output_dir: Path) -> tuple[int, dict[str, Any]]:
    """Return the steps of the recipe's own run, and its data: a dry run, which checks all before the first run."""
    with contextlib.redirect_stderr(io.StringIO()):  # each run's log has these lines
        facts = run(load_recipe(name, words), output_dir / "whole", dry_run=True, quiet=True)
    return facts["plan"]["num_steps"], facts["data"]["train"]


def _without_selection(name: str, words: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Load a recipe with ``keep`` and patience off: with them, it may be refused for want of held-out rows."""
    recipe = load_recipe(name, [*words, *SELECTION_OFF])
    try:
        selects = load_recipe(name, words).train.selects
    except RecipeError:
        selects = True
    if not selects:
        return recipe, []
    return recipe, ["off in the search: train.keep: best and early stopping; every run is measured after its last step"]


def _plan(recipe: tuple[str, list[str]], rates: Sequence[float], seeds: int) -> SweepPlan:
    name, words = recipe
    texts = [text_of(rate) for rate in rates]
    return plan_sweep(name, [*words, f"{RATE}={','.join(texts)}"], seeds=seeds)


def tune(
    search: Search,
    output_dir: Path,
    output: Path,
    runner: Runner,
    display: Display,
    *,
    force: bool = False,
    parallel: int = 1,
    command: str = "the same command",
) -> TuneResults:
    """Train what is not trained yet, choose a rate, and write a copy of the recipe with it.

    Args:
        search: From `plan_search`.
        output_dir: A new or empty folder, or this search's.
        output: Where the copy goes.
        runner: Trains a run and measures `MEASURES`.
        display: Shows how it goes.
        force: Whether a copy that is there may be replaced; otherwise it is left as it is.
        parallel: Runs at a time.
        command: The command with which to continue.

    Returns:
        The content of ``tune.json``.

    Raises:
        UserInputError: If the folder holds something else.
        RunFailed: If a run failed for another reason than that it diverged.
        RunInterrupted: If a signal asked to stop; every run under way has written a checkpoint.
    """
    rates = _with_earlier(search.rates, output_dir)
    with held(output_dir):
        for line in (*search.notes, search.budget):
            display.say(line)
        while True:
            plan = search.plan(rates)
            trained = train_missing(
                plan, output_dir, runner, display, measures=MEASURES, parallel=parallel, divergence_is_a_result=True
            )
            if trained.finished < trained.of:
                break
            following = beyond(points_of(plan, output_dir), search.rates) if search.extends else None
            if following is None:
                break
            display.say(f"the lowest loss is at an end of the curve: {text_of(following)} is tried as well")
            rates = sorted([*rates, following])
        trained.check(f"they are in {output_dir}", command)
        results = results_of(plan, output_dir, own=search.own, steps=search.steps, full_steps=search.full_steps)
        return write_files(results, output_dir, output, name=search.name, words=search.words, force=force)


def _with_earlier(rates: Sequence[float], output_dir: Path) -> list[float]:
    """Return the rates and those that the folder's search has tried already: they belong to its curve."""
    earlier = read_sweep(output_dir) if output_dir.is_dir() else None
    tried = earlier.swept.get(RATE, []) if earlier else []
    return sorted({*rates, *(float(text) for text in tried)})


def check_search(search: Search, output_dir: Path) -> DryRun:
    """Return what would be trained; nothing is written.

    Raises:
        UserInputError: If the folder holds something else.
    """
    plan = search.plan(_with_earlier(search.rates, output_dir))
    open_sweep(plan, output_dir, write=False)
    entries: list[DryRunEntry] = []
    for planned in plan.runs:
        folder = output_dir / planned.name
        state = "finished" if is_trained(folder) else "begun" if is_begun(folder) else ""
        entries.append({"name": planned.name, "state": state, "steps": search.steps, "tokens": search.tokens})
    left = sum(entry["tokens"] for entry in entries if entry["state"] != "finished")
    return {"decides": [*search.notes, search.budget], "runs": entries, "tokens": left}
