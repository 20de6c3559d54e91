"""The subject of a measurement: a recipe's base on its data, a run's, or any model's embedding. No model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...adapter.folder import find_adapter
from ...base.checkpoint import read_embedding
from ...base.config import check_base_config, check_vocabulary, load_tokenizer
from ...base.precision import resolve_precision
from ...display.console import quiet_libraries
from ...errors import UserInputError
from ...paths import kind_of, resolve_bundled, shown_path
from ...recipe import Recipe, load_recipe
from ...runner.build import data_of, model_path
from .report import EmbeddingNoiseReport, embedding_noise_report
from .table import EmbeddingTable

RECIPE, CONFIG = "recipe.yaml", "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
LENGTHS = (50, 100, 200, 500)  # for the whole vocabulary, unless others are given


@dataclass(frozen=True)
class Subject:
    """A model to measure, and the recipe that names its data, if there is one."""

    model: str
    revision: str | None
    recipe: Recipe | None


def report_on(
    source: str,
    overrides: Sequence[str] = (),
    *,
    alphas: Sequence[float],
    lengths: Sequence[int] = (),
    whole_vocabulary: bool = False,
    rows: int,
    device: str = "auto",
    say: Callable[[str], None] | None = None,
) -> EmbeddingNoiseReport:
    """Measure token flips and singular values, see `embedding_noise_report`.

    Args:
        source: A recipe's name or file, a run's folder, a model's folder or Hub id.
        overrides: Changes to the recipe.
        alphas: Noise strengths.
        lengths: Values of L for noise on the whole vocabulary.
        whole_vocabulary: Measure it even without ``lengths``; without data it is always measured.
        rows: Maximum number of training sequences to measure, drawn at random by the recipe's seed.
        device: ``auto``, ``cpu`` or ``cuda``.
        say: Called with what is being done.

    Raises:
        UserInputError: If model, recipe or data cannot be read.
    """
    target = resolve_precision("fp32", device).device  # only the device: distances are computed in float32 throughout
    subject = find_subject(source, overrides)
    with quiet_libraries():
        tokenizer = _tokenizer(subject)
        sequences = _sequences(subject, tokenizer, rows)
        # The embedding alone is read, from the checkpoint: no model is built, however large.
        table = EmbeddingTable(read_embedding(subject.model, revision=subject.revision), target)
    if (whole_vocabulary or not sequences) and not lengths:
        lengths = LENGTHS  # without data there is no L of its own
    noise = subject.recipe.neftune if subject.recipe else None
    report = embedding_noise_report(
        table,
        sequences,
        alphas=alphas,
        lengths=lengths,
        seed=subject.recipe.train.seed if subject.recipe else 0,
        distribution=noise.distribution if noise else "uniform",
        spell=None if tokenizer is None else lambda token: tokenizer.decode([token]),
        say=say,
    )
    return {"model": shown_path(subject.model), **report}


def find_subject(source: str, overrides: Sequence[str] = ()) -> Subject:
    """Find the model, and the recipe if there is one, that a name stands for.

    Args:
        source: A recipe's name or file, a run's folder or one of its checkpoints, an adapter's or a model's folder, a
            Hub id, or ``bundled:...``.
        overrides: Changes to the recipe.

    Raises:
        UserInputError: If there is no such thing, or overrides are given without a recipe.
    """
    folder, kind = Path(source).expanduser(), kind_of(source, suffixes=(".yaml", ".yml"))
    if kind == "bundled":
        return _model(resolve_bundled(source), None, overrides)
    if kind == "hub" and "/" in source:  # one word is a recipe's name
        return _model(source, None, overrides)
    if not folder.is_dir():
        return _of_recipe(load_recipe(source, overrides))
    # A run's folder also holds an adapter, so its recipe is looked for first.
    for place in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        if (place / RECIPE).is_file():
            return _of_recipe(load_recipe(place / RECIPE, overrides))
    if (folder / CONFIG).is_file():
        return _model(str(folder), None, overrides)
    adapter = find_adapter(folder)
    return _model(adapter.base, adapter.base_revision, overrides)


def _of_recipe(recipe: Recipe) -> Subject:
    return Subject(model_path(recipe), recipe.model.revision, recipe)


def _model(path: str, revision: str | None, overrides: Sequence[str]) -> Subject:
    if overrides:
        raise UserInputError(
            f"{overrides[0]}: there is no recipe to change. Name a recipe or a run instead of a model."
        )
    return Subject(path, revision, None)


def _tokenizer(subject: Subject) -> Any | None:
    """Load the model's tokenizer; None for a folder of weights alone, whose tokens are then named by number."""
    folder = Path(subject.model)
    if subject.recipe is None and folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    return load_tokenizer(subject.model, revision=subject.revision)


def _sequences(subject: Subject, tokenizer: Any, rows: int) -> list[Tensor]:
    if subject.recipe is None:
        return []
    train = data_of(subject.recipe, tokenizer).train
    # Drawn, not the first: files are often sorted, and L matters here.
    order = np.random.default_rng(subject.recipe.train.seed).permutation(len(train))[:rows]
    sequences = [torch.tensor(ids) for ids in train.select(order)["input_ids"]]
    # A tokenizer with more tokens than the embedding has rows would fail deep inside the search.
    config = check_base_config(subject.model, revision=subject.revision)
    check_vocabulary(config, max(int(ids.max()) for ids in sequences))
    return sequences
