"""What is measured of finished runs on the data of their recipes: losses, and how much of it they recite.

The numbers are also kept in each run's ``measures.json``, under ``loss`` and ``overfit``, where reports find them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.folder import AdapterFolder, find_adapter
from ..adapter.load import Trained, load_trained
from ..errors import UserInputError
from ..generation.answers import Question, questions
from ..generation.decode import Decoding
from ..run_folder.record import keep_measures
from ..runner.run_data import RECIPE, _other_data, recipe_data
from .losses import prepare_for_losses, set_loss
from .overfit import Overfit, measure_overfit

TRAIN, HELD_OUT = "train", "held out"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Machine:
    """Where and how a measure is computed; none of it changes what is measured but for rounding.

    Attributes:
        device, precision, base: As in `load_trained`.
        batch_size: Sequences at a time.
    """

    device: str = "auto"
    precision: str = "auto"
    base: str | None = None
    batch_size: int = 8

    def load(self, folder: AdapterFolder) -> Trained:
        """Base and adapter."""
        return load_trained(folder, device=self.device, precision=self.precision)


# ---- Figure 5 ----


def training_questions(trained: Trained, rows: int, overrides: Sequence[str] = ()) -> list[Question]:
    """The first training rows of a run as questions.

    Raises:
        UserInputError: If none of them has a prompt.
    """
    data = recipe_data(trained.folder, trained.tokenizer, overrides)
    asked = questions(data.train, trained.tokenizer, rows, data.stop_token_ids)
    if not asked:
        raise UserInputError(f"{trained.folder.source}: no training row has a prompt, so there is nothing to answer.")
    return asked


def overfit_of_runs(
    sources: Sequence[str],
    *,
    rows: int,
    decoding: Decoding,
    machine: Machine | None = None,
    overrides: Sequence[str] = (),
    say: Say = lambda line: None,
) -> dict[str, Overfit]:
    """Greedy answers of several runs to their first training prompts, see `measure_overfit`.

    Args:
        sources: Folders of runs.
        rows: Training rows of each.
        decoding: How tokens are chosen.
        machine: Where it is computed.
        overrides: Of the recipes, where the data has moved.
        say: Told how far it is.
    """
    machine, found = machine or Machine(), {}
    for folder in _folders(sources, machine):
        trained = machine.load(folder)
        asked = training_questions(trained, rows, overrides)
        progress = _progress(say, f"{folder.source}: answers")
        result = measure_overfit(trained, asked, decoding, batch_size=machine.batch_size, progress=progress)
        numbers = result.to_dict()
        keep_measures(
            folder.source, "overfit", {f"train_prompts_{name}": numbers[name] for name in ("rouge_l", "bleu")}
        )
        found[folder.source] = result
    return found


# ---- Figure 4 ----


def losses_of_runs(
    sources: Sequence[str],
    data: Mapping[str, str],
    *,
    rows: int = 0,
    machine: Machine | None = None,
    overrides: Sequence[str] = (),
    say: Say = lambda line: None,
) -> list[dict[str, Any]]:
    """Losses of several runs and their bases, on their own training and held-out rows and on other data.

    Args:
        sources: Folders of runs, or adapters of other origin, which have no data of their own.
        data: Further sets by name: local files or Hub ids, prepared as each run prepares its own.
        rows: The first so many sequences of each set; 0 for all.
        machine: Where it is computed.
        overrides: Of the recipes, where the data has moved.
        say: Told how far it is, and what is wrong with further data.

    Returns:
        For each set ``set``, ``rows``, ``tokens``, ``base_model``, ``base`` and ``adapters``: losses in nats per
        trained token, those of the adapters by source. Runs with the same rows and base share an entry.
    """
    machine, found = machine or Machine(), {}
    for folder in _folders(sources, machine):
        trained = machine.load(folder)
        prepare_for_losses(trained)
        numbers = {}
        for name, dataset, digest in _sets(trained, data, overrides, say):
            part = dataset.select(range(min(rows, len(dataset)))) if rows else dataset
            base, key = folder.base, (name, digest, folder.base, folder.base_revision)
            progress = _progress(say, f"{folder.source}, {name}: sequences")
            options = {"batch_size": machine.batch_size, "progress": progress}
            if key not in found:
                alone = set_loss(trained, part, base_alone=True, **options)
                about = {"set": name, "rows": alone.rows, "tokens": alone.tokens, "base_model": base}
                found[key] = {**about, "base": alone.loss, "adapters": {}}
            loss = set_loss(trained, part, **options).loss
            found[key]["adapters"][folder.source] = loss
            numbers[_measure_name(name)] = loss
        if not rows:
            keep_measures(folder.source, "loss", numbers)
    return list(found.values())


def _sets(trained: Trained, data: Mapping[str, str], overrides: Sequence[str], say: Say) -> list[tuple[str, Any, str]]:
    """Name, sequences and hash of each set."""
    found, folder = [], trained.folder
    if folder.recipe is not None:
        own = recipe_data(folder, trained.tokenizer, overrides)
        found.append((TRAIN, own.train, own.report["train"]["sha256"]))
        if own.eval is not None:
            found.append((HELD_OUT, own.eval, own.report["eval"]["sha256"]))
    elif not data:
        raise UserInputError(f"{folder.source}: holds no {RECIPE}, so it has no data of its own. Give --data FILE.")
    for name, path in data.items():
        other = _other_data(trained, path)
        for problem in other.report["problems"]:
            say(f"{name}: {problem}")
        if not len(other.train):
            raise UserInputError(f"--data: {path!r} has no row that can be learned from.")
        found.append((name, other.train, other.report["train"]["sha256"]))
    return found


def _folders(sources: Sequence[str], machine: Machine) -> list[AdapterFolder]:
    """All of them found before the first is loaded."""
    if len(set(sources)) < len(sources):
        raise UserInputError("DIR: a folder is named twice. Name each once.")
    return [find_adapter(source, base=machine.base) for source in sources]


def _measure_name(set_name: str) -> str:
    known = {TRAIN: "whole_train_loss", HELD_OUT: "held_out_loss"}
    return known.get(set_name) or f"{Path(set_name).name.replace(' ', '_')}_loss"


def _progress(say: Say, what: str) -> Callable[[int, int], None]:
    return lambda done, total: say(f"{what} {done:,} of {total:,}")
