"""Rows to prove a merge on: the run's own held-out ones, a file's, or else the first it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..data import Settings, Source, prepare_data
from ..errors import UserInputError
from ..files.suffixes import JINJA_SUFFIXES
from ..recipe import Recipe
from ..running.unpack import data_of
from ..trained import AdapterFolder

MAX_LENGTH = 1024  # tokens of a row, where no recipe says


@dataclass(frozen=True)
class ProofRows:
    """Tokenized rows.

    Attributes:
        rows: Of ``input_ids`` and ``labels``.
        origin: Where they are from, for a person.
    """

    rows: list[dict[str, Any]]
    origin: str


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
        first_line = str(error).strip().splitlines()[0]
        raise UserInputError(f"{folder.source}: the data of the run cannot be read ({first_line}) {remedy}") from error


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
