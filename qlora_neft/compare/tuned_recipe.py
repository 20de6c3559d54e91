"""A copy of a recipe with the rate that a search found: comments stay, and one says how it was found."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..errors import RecipeError, UserInputError
from ..files import read_record_if_there
from ..recipe import load_recipe
from ..recipe.edit import CannotEdit, with_values
from ..recipe.load import apply_overrides, find_recipe
from .rates import text_of

RATE, TUNE_FILE = "train.learning_rate", "tune.json"


def check_output(output: Path, search_dir: Path, *, force: bool) -> None:
    """Refuse a file that is there, unless it may be replaced or this folder's search wrote it.

    Raises:
        UserInputError: If it is refused.
    """
    if force or not output.exists():
        return
    earlier = read_record_if_there(search_dir / TUNE_FILE, "Remove it: it is made anew.") or {}
    if earlier.get("written") != str(output):
        raise UserInputError(f"--output: {str(output)!r} is there already. Give another file, or --force.")


def text_of_copy(name: str, words: Sequence[str], rate: float, remarks: Sequence[str]) -> tuple[str, bool]:
    """Return the text of the copy.

    Args:
        name: The recipe's name or path.
        words: Overrides, which become part of it.
        rate: The learning rate.
        remarks: Lines of comment above it.

    Returns:
        The text, and whether it is the recipe's own but for the changes. If the recipe is written in a way that leaves
        no place for them, every key is written anew.
    """
    text = tuned_text(name, words, rate, remarks)
    if text is not None:
        return text, True
    lines = "".join(f"# {line}\n" for line in remarks)
    return lines + load_recipe(name, [*words, f"{RATE}={text_of(rate)}"]).to_yaml(), False


def tuned_text(name: str, words: Sequence[str], rate: float, remarks: Sequence[str]) -> str | None:
    """Return the recipe's text with the overrides and the rate; None if they cannot be put in their places."""
    text = find_recipe(name).read_text(encoding="utf-8")
    values = {
        ".".join(place): word.partition("=")[2] for place, word in apply_overrides({}, list(words)).origins.items()
    }
    try:
        text = with_values(text, {**values, RATE: text_of(rate)}, {RATE: remarks})
    except (CannotEdit, yaml.YAMLError):
        return None
    return text if _says(text, name, [*words, f"{RATE}={text_of(rate)}"]) else None


def _says(text: str, name: str, words: Sequence[str]) -> bool:
    """Whether a text is the recipe that the overrides make."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuned.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return load_recipe(path).to_dict() == load_recipe(name, words).to_dict()
        except RecipeError:
            # A recipe that keeps the best weights and holds out nothing is refused, in both forms: as it was.
            return not _loads(name, words)


def _loads(name: str, words: Sequence[str]) -> bool:
    try:
        load_recipe(name, words)
    except RecipeError:
        return False
    return True
