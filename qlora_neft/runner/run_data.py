"""The rows of a finished run, as training had them: for measuring it, and for proving a merge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..adapter.folder import RECIPE, AdapterFolder
from ..adapter.load import Trained
from ..data.prepare import PreparedData, prepare_data
from ..data.store import SEQUENCE_KEYS
from ..errors import UserInputError, first_line
from ..export.hub.public import public_path
from ..export.merge.proof import ProofRows
from ..paths import JINJA_SUFFIXES
from ..recipe import Recipe, load_recipe
from ..recipe.schema import Data
from .build import data_of
from .identity import moment_in

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

NAME_KEYS = (
    "columns",
    "roles",
    "system_prompt",
)  # what the user's names mean, and what rows without a system message get
MAX_LENGTH = 1024  # tokens per sequence, for adapters without a recipe


def recipe_data(
    folder: AdapterFolder, tokenizer: PreTrainedTokenizerBase, overrides: Sequence[str] = ()
) -> PreparedData:
    """Return the sequences a run was trained and evaluated on, by the recipe in its folder.

    Args:
        folder: A run's folder, or that of one of its checkpoints.
        tokenizer: The run's tokenizer.
        overrides: ``section.key=value``, for data that has moved.

    Raises:
        UserInputError: If there is no recipe, or its data cannot be read.
    """
    # A checkpoint's recipe lies one level up, in the run's folder.
    files = [folder.path / RECIPE, folder.path.parent / RECIPE]
    file = next((path for path in files if folder.recipe is not None and path.is_file()), None)
    if file is None:
        raise UserInputError(
            f"{folder.source}: holds no {RECIPE}, so its training data is not known. Give the --output-dir of a run."
        )
    # Not refused: the run was trained on these rows, whatever the gate says of them today.
    return data_of(load_recipe(file, overrides), tokenizer, refuse=False, now=moment_in(folder.path))


def other_data(trained: Trained, path: str) -> PreparedData:
    """Return the sequences of another data file or Hub dataset, in a run's own template and length."""
    return _read_like_the_runs(trained.folder, trained.tokenizer, path, trained.prompts.name, "--data")


def proof_rows(
    folder: AdapterFolder, tokenizer: PreTrainedTokenizerBase, template: str, path: str | None, count: int
) -> ProofRows:
    """Return rows to prove a merge on: the run's held-out rows, else its training rows, or another file's.

    Args:
        folder: The adapter, with the recipe of its run.
        tokenizer: The adapter's tokenizer.
        template: The prompt template it was trained with.
        path: Another file or Hub dataset to take the rows from.
        count: Maximum number of rows.

    Raises:
        UserInputError: If there are no rows, with what to do.
    """
    if path is not None:
        # A Jinja file of the user's was saved as the tokenizer's chat template; the recorded path may be gone.
        own = "chat" if template.endswith(JINJA_SUFFIXES) else "auto" if template == "none" else template
        found = _read_like_the_runs(folder, tokenizer, path, own, "--proof-data").train
        return ProofRows(_first(found, count), public_path(path))
    remedy = "Give rows like those it was trained on with --proof-data FILE, or merge unproven with --no-proof."
    if folder.recipe is None:
        raise UserInputError(f"{folder.source}: no recipe.yaml says what it was trained on. {remedy}")
    try:
        recipe = Recipe.model_validate(folder.recipe.to_dict())  # an incomplete record is refused here, with the key
        found, origin = _own_rows(recipe, tokenizer, moment_in(folder.path))
        return ProofRows(_first(found, count), origin)
    except (ValidationError, UserInputError) as error:
        raise UserInputError(
            f"{folder.source}: the data of the run cannot be read ({first_line(error)}) {remedy}"
        ) from error


def _read_like_the_runs(
    folder: AdapterFolder, tokenizer: PreTrainedTokenizerBase, path: str, template: str, key: str
) -> PreparedData:
    """Prepare the rows of another path as the run's were; ``key`` is the option that names it."""
    keys = (*SEQUENCE_KEYS, *NAME_KEYS)
    stated = {name: getattr(folder.recipe.data, name) for name in keys} if folder.recipe else {}
    # Keys of a recorded recipe that another version wrote may be missing or None: the defaults stand for them.
    kept = {"max_length": MAX_LENGTH} | {name: value for name, value in stated.items() if value is not None}
    # Not validated: no recipe may state the template "none", which is what plain text is trained with.
    section = Data.model_construct(None, path=path, prompt_template=template, **kept)
    columns, now = dict(section.columns), moment_in(folder.path)
    while True:
        named = section.model_copy(update={"columns": columns})
        try:
            return prepare_data(tokenizer, named, key=key, refuse=False, now=now)
        except UserInputError as error:
            # It may have some of the columns that the run's rows have, or those of a format.
            lacking = [name for name in columns if str(error).startswith(f"data.columns: {name!r} is no column")]
            if not lacking:
                raise
            columns = {name: ours for name, ours in columns.items() if name not in lacking}


def _own_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, now: datetime | None) -> tuple[Dataset, str]:
    """Return the run's held-out rows, or its training rows without any, and where they are from.

    Rendered by the date of the run, ``now``.
    """
    data = recipe.data
    if data.eval_fraction is not None:
        found = data_of(recipe, tokenizer, refuse=False, now=now).eval
        assert found is not None  # a dataset even if the share comes to no row
        return found, f"held-out rows of {public_path(data.path)}"
    if not data.has_eval_rows:
        found = data_of(recipe, tokenizer, refuse=False, now=now).train
        return found, f"training rows of {public_path(data.path)}, none are held out"
    # Prepare the held-out source alone: the training rows may be many.
    changes: dict[str, Any] = {"eval_path": None, "eval_split": None, "mixture": [], "weight": 1.0}
    if data.eval_path is not None:
        changes |= {"path": data.eval_path, "revision": None, "data_files": None, "name": None}
    changes["split"] = data.eval_split or "train"
    held_out = data.model_copy(update=changes)
    found = data_of(recipe.model_copy(update={"data": held_out}), tokenizer, refuse=False, now=now).train
    return found, f"held-out rows of {public_path(held_out.path)}"


def _first(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """Return the first rows that have a trained token."""
    # labels[1:], since no position predicts the first token.
    rows: Iterable[Any] = (row for row in dataset if any(label >= 0 for label in row["labels"][1:]))
    found = [{"input_ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in islice(rows, count)]
    if not found:
        raise UserInputError("--proof-data: no row has a token to be proven on. Give rows with responses.")
    return found
