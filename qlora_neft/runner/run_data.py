"""Rows to prove a merge on: the run's own held-out ones, a file's, or else the first it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from ..adapter.folder import AdapterFolder
from ..adapter.load import Trained
from ..data.prepare import PreparedData, prepare_data
from ..data.sources import Source
from ..data.worker import Settings
from ..errors import UserInputError, first_line
from ..export.merge.proof import ProofRows
from ..paths import JINJA_SUFFIXES
from ..recipe import Recipe, load_recipe
from .build import data_of

MAX_LENGTH = 1024  # tokens of a row, where no recipe says


def proof_rows(folder: AdapterFolder, tokenizer: Any, template: str, path: str | None, count: int) -> ProofRows:
    """Prepare the first rows as training had them.

    Args:
        folder: The adapter, with the recipe of its run.
        tokenizer: Its own.
        template: The prompt template it was trained with.
        path: A file to take them from instead; a local path or a Hub id.
        count: How many at most.

    Raises:
        UserInputError: If there are none, with what to do.
    """
    if path is not None:
        data = (folder.recipe or {}).get("data", {})
        own = "chat" if template.endswith(JINJA_SUFFIXES) else "auto" if template == "none" else template
        source = Source(path, prompt_template=own, key="--proof-data")
        settings = Settings(data.get("max_length", MAX_LENGTH), data.get("train_on_prompt", False))
        return ProofRows(_first(_from_file(tokenizer, source, settings), count), path)
    remedy = "Give rows like those it was trained on with --proof-data FILE, or merge unproven with --no-proof."
    if folder.recipe is None:
        raise UserInputError(f"{folder.source}: no recipe.yaml says what it was trained on. {remedy}")
    try:
        recipe = Recipe.model_validate(folder.recipe)
        return _from_recipe(recipe, tokenizer, count)
    except (ValidationError, UserInputError) as error:
        raise UserInputError(
            f"{folder.source}: the data of the run cannot be read ({first_line(error)}) {remedy}"
        ) from error


def _from_recipe(recipe: Recipe, tokenizer: Any, count: int) -> ProofRows:
    data = recipe.data
    if data.eval_fraction is not None:
        return ProofRows(_first(data_of(recipe, tokenizer, refuse=False).eval, count), f"held-out rows of {data.path}")
    if not data.has_eval_rows:
        found = data_of(recipe, tokenizer, refuse=False).train
        return ProofRows(_first(found, count), f"training rows of {data.path}, none are held out")
    # The held-out source alone: the training rows may be many.
    changes: dict[str, Any] = {"eval_path": None, "eval_split": None, "mixture": [], "weight": 1.0}
    if data.eval_path is not None:
        changes |= {"path": data.eval_path, "revision": None, "data_files": None, "name": None}
    changes["split"] = data.eval_split or "train"
    held_out = recipe.model_copy(update={"data": data.model_copy(update=changes)})
    found = data_of(held_out, tokenizer, refuse=False).train
    return ProofRows(_first(found, count), f"held-out rows of {held_out.data.path}")


def _from_file(tokenizer: Any, source: Source, settings: Settings) -> Any:
    return prepare_data(tokenizer, sources=[source], settings=settings, refuse=False).train


def _first(dataset: Any, count: int) -> list[dict[str, Any]]:
    """The first rows in which anything was trained."""
    rows = []
    for row in dataset:
        if len(rows) == count:
            break
        if any(label >= 0 for label in row["labels"][1:]):
            rows.append({"input_ids": list(row["input_ids"]), "labels": list(row["labels"])})
    if not rows:
        raise UserInputError("--proof-data: no row has a token to be proven on. Give rows with responses.")
    return rows


RECIPE = "recipe.yaml"


def recipe_data(folder: AdapterFolder, tokenizer: Any, overrides: Sequence[str] = ()) -> PreparedData:
    """The sequences a run was trained and measured on, by the recipe in its folder.

    Args:
        folder: A run's, or that of one of its checkpoints.
        tokenizer: The run's.
        overrides: ``section.key=value``, where the data has moved.

    Raises:
        UserInputError: If there is no recipe, or its data cannot be read.
    """
    files = [folder.path / RECIPE, folder.path.parent / RECIPE]
    file = next((path for path in files if folder.recipe is not None and path.is_file()), None)
    if file is None:
        raise UserInputError(
            f"{folder.source}: holds no {RECIPE}, so its training data is not known. Give the --output-dir of a run."
        )
    return data_of(load_recipe(file, overrides), tokenizer, refuse=False)


def _other_data(trained: Trained, path: str) -> PreparedData:
    """Another data file, in the template and the length of a run."""
    stated = (trained.folder.recipe or {}).get("data", {})
    names = ("train_on_prompt", "keep_end_token", "split_conversations")
    settings = Settings(stated.get("max_length", 512), **{name: stated[name] for name in names if name in stated})
    source = Source(path, prompt_template=trained.prompts.name, key="--data")
    return prepare_data(trained.tokenizer, sources=[source], settings=settings, refuse=False)
