"""The folder that is published: whole before it is moved there; from the same adapter the same bytes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..display.loss_plot import plot_losses
from ..display.run_lines import title
from ..errors import UserInputError
from ..files.json_file import write_json
from ..trained import AdapterFolder, Prompts
from ..trained.folder import CONFIG, RECIPE, WEIGHTS
from ..trained.prompts import template_of
from .ask import BaseFacts
from .card import render_card
from .made_before import FILES_KEY, SUMMARY, check_replaceable, sha256_of_files
from .metadata import card_data
from .no_secrets import refuse_secrets
from .public_recipe import public_recipe
from .records import Records, read_records
from .tokenizer_files import write_tokenizer
from .training_summary import training_summary
from .usage import snippets
from .weights import stored_dtype, write_weights

CARD, CURVES = "README.md", "loss.png"


@dataclass(frozen=True)
class Export:
    """What is to be published.

    Attributes:
        repo_id: Where it goes.
        base: Hub id of the base and its commit, None for one that is not known.
        dtype: ``float32`` or ``bfloat16``; None as it was trained.
        license: Front matter of the license, empty without one.
        license_is_bases: Whether that is the base's, as the Hub has it.
        write_recipe: Plain values of a recipe to its text.
    """

    repo_id: str
    base: tuple[str, str | None]
    dtype: str | None
    license: dict[str, str]
    license_is_bases: bool
    write_recipe: Callable[[dict[str, Any]], str]


def license_of(stated: str | None, facts: BaseFacts) -> dict[str, str]:
    """Front matter of the license: as stated, else the base's."""
    return {"license": stated} if stated else facts.license or {}


def build_folder(folder: AdapterFolder, output: Path, export: Export) -> str:
    """Write everything that is published into a folder of its own.

    Args:
        folder: The adapter; nothing in it is changed.
        output: New, empty, or made by an earlier export and not touched since.
        export: What to write.

    Returns:
        The model card's text.

    Raises:
        UserInputError: If ``output`` holds anything else or cannot be written, or a record cannot be read.
    """
    check_replaceable(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as draft:
            made = Path(draft) / "folder"
            made.mkdir()
            card = _fill(made, folder, export)
            _move(made, output)
    except OSError as error:
        raise UserInputError(
            f"--output: {str(output)!r} cannot be written ({error.strerror}). Give another folder."
        ) from error
    return card


def _fill(made: Path, folder: AdapterFolder, export: Export) -> str:
    records = read_records(folder)
    recipe = public_recipe(folder.recipe, *export.base) if folder.recipe else None
    trained = stored_dtype(folder.path / WEIGHTS)
    dtype = export.dtype or trained
    write_weights(folder.path / WEIGHTS, made / WEIGHTS, dtype)
    config = _write_config(made / CONFIG, folder.config, export.base)
    has_tokenizer = write_tokenizer(folder, made)
    if recipe is not None:
        (made / RECIPE).write_text(export.write_recipe(recipe), encoding="utf-8")
    has_curves = recipe is not None and _draw(records, recipe, folder, made / CURVES)
    weights = {"dtype": dtype, "trained_dtype": trained}
    summary = training_summary(records, folder.recipe, export.base, weights)
    prompts, eos = _prompts(folder, made) if has_tokenizer else (None, None)
    card = render_card(
        export.repo_id,
        card_data(export.repo_id, summary, recipe, export.license),
        summary,
        recipe,
        config,
        snippets(export.repo_id, summary, config, prompts, eos),
        has_curves=has_curves,
        license_is_bases=export.license_is_bases,
    )
    (made / CARD).write_text(card, encoding="utf-8")
    write_json(made / SUMMARY, {**summary, FILES_KEY: sha256_of_files(made)})
    refuse_secrets(made, _local_paths(folder))
    return card


def _write_config(path: Path, config: dict[str, Any], base: tuple[str, str | None]) -> dict[str, Any]:
    """``adapter_config.json`` with a base that others can load; lists in order, for PEFT writes sets."""
    public = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    public |= {"base_model_name_or_path": base[0], "revision": base[1], "inference_mode": True}
    path.write_text(json.dumps(public, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return public


def _draw(records: Records, recipe: dict[str, Any], folder: AdapterFolder, path: Path) -> bool:
    """The curves, drawn again: the run's own picture is headed by the path of its base."""
    if records.log:
        return plot_losses(records.log, path, title(recipe))
    if folder.summary is not None and FILES_KEY in folder.summary and (folder.path / CURVES).is_file():
        shutil.copyfile(folder.path / CURVES, path)  # an export of an export
    return path.is_file()


def _prompts(folder: AdapterFolder, made: Path) -> tuple[Prompts, int]:
    """The prompts of the training, by the tokenizer that is published."""
    from ..tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(made))
    return Prompts(tokenizer, template_of(folder.recipe, folder.summary, tokenizer)), tokenizer.eos_token_id


def _local_paths(folder: AdapterFolder) -> list[str]:
    """Absolute paths that a record of the run may hold."""
    recorded = folder.config.get("base_model_name_or_path") or ""
    stated = (folder.recipe or {}).get("model", {}).get("name_or_path", "")
    found = {str(folder.path.absolute()), str(folder.path.resolve()), str(Path.home()), str(Path.cwd())}
    found |= {path for path in (recorded, stated) if path.startswith(("/", "~"))}
    return sorted(path for path in found if len(path) > 1)


def _move(made: Path, output: Path) -> None:
    if output.exists():
        shutil.rmtree(output)
    made.rename(output)
