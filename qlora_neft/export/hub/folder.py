"""The folder that is published: complete before it gets its name; the same adapter gives the same bytes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...adapter.folder import CONFIG, MEND, RECIPE, WEIGHTS, AdapterFolder
from ...adapter.load import tokenizer_of_adapter
from ...adapter.names import check_names
from ...adapter.prompts import Prompts, prompts_of
from ...base.config import load_tokenizer
from ...base.model_files import stored_tensors
from ...data.templates import read_jinja
from ...display.console import title
from ...display.plots import plot_losses
from ...errors import UserInputError
from ...files import read_json, sha256_of_file, whole_folder, write_json
from ...recipe import Recipe
from ...run_folder.tokenizer_files import CONFIG as TOKENIZER_CONFIG
from ...run_folder.tokenizer_files import FILES as TOKENIZER_FILES
from ...run_folder.tokenizer_files import save_tokenizer
from ..abilities import facts_of
from ..inputs import CURVES, check_picture, check_tokenizer_file, refuse_links_of_adapter
from .base import BaseFacts
from .card import render_card
from .public import (
    CARD,
    SUMMARY,
    PublicBase,
    Published,
    is_template_file,
    public_recipe,
    public_recipe_text,
    refuse_secrets,
)
from .records import Records, Training, read_records
from .usage import snippets

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # torch's names of what safetensors stores
PATH_KEYS = ("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file")  # of tokenizer_config.json


@dataclass(frozen=True)
class Export:
    """Everything an export needs besides the adapter.

    Attributes:
        repo_id: Repository it goes to.
        base: The base on the Hub.
        dtype: ``float32`` or ``bfloat16``; None keeps the dtype of the training.
        license: Front matter of the license, empty without one.
        license_is_bases: Whether that is the base's license, as the Hub has it.
    """

    repo_id: str
    base: PublicBase
    dtype: str | None
    license: dict[str, str]
    license_is_bases: bool


def license_of(stated: str | None, facts: BaseFacts) -> dict[str, str]:
    """Return front matter of the license: as stated, else the base's."""
    # A stated license stands alone: the base's name and link would belong to another.
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
    # Before the work: a folder with somebody's own files is never replaced.
    _check_replaceable(output)
    refuse_links_of_adapter(folder)
    check_names(folder)  # nobody could use an adapter that is not whole
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(output, synced=True) as draft:
            return _fill(draft, folder, export)
    except OSError as error:
        raise UserInputError(
            f"--output: {str(output)!r} cannot be written ({error.strerror}). Give another folder."
        ) from error


def _check_replaceable(output: Path) -> None:
    """Refuse a folder that holds anything but an export as it was written.

    Raises:
        UserInputError: With what would be lost.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserInputError(f"--output: {str(output)!r} is not a folder. Give a new one.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    written = _files_as_written(output)
    if written is None:
        raise UserInputError(
            f"--output: {str(output)!r} is not empty and holds no export; nothing in it may be lost. Give a new folder."
        )
    # The summary holds the hashes of all others and cannot hold its own.
    there = {path.name: sha256_of_file(path) for path in output.iterdir() if path.is_file() and path.name != SUMMARY}
    folders = [path.name for path in output.iterdir() if path.is_dir()]
    changed = sorted({name for name, sha256 in there.items() if written.get(name) != sha256} | set(folders))
    if changed:
        raise UserInputError(
            f"--output: {str(output)!r} was changed since it was exported ({', '.join(changed)}), and the change would "
            "be lost. Remove the folder or give another. To publish it as it is: hf upload"
        )


def _files_as_written(output: Path) -> dict[str, str] | None:
    try:
        content = read_json(output / SUMMARY)
    except (OSError, ValueError):
        return None
    return Published.of(content).files if isinstance(content, dict) else None


# ---- Its files ----


def _fill(made: Path, folder: AdapterFolder, export: Export) -> str:
    trained_dtype = stored_dtype(folder.path / WEIGHTS)
    dtype = export.dtype or trained_dtype
    training = Training(export.base, folder.recipe, read_records(folder), dtype, trained_dtype)
    public = public_recipe(folder.recipe, export.base) if folder.recipe else None
    _write_weights(folder.path / WEIGHTS, made / WEIGHTS, trained_dtype, dtype)
    config = _write_config(made / CONFIG, folder.config, export.base)
    prompts, eos = _prompts(folder, made) if _write_tokenizer(folder, made) else (None, None)
    # The recipe with public names, from which the training can be repeated.
    if public is not None:
        (made / RECIPE).write_text(public_recipe_text(public), encoding="utf-8")
    card = render_card(
        export.repo_id,
        training,
        public,
        config,
        snippets(export.repo_id, export.base, config, folder.quantization, prompts, eos, facts_of(folder)),
        export.license,
        has_curves=public is not None and _draw(training.records, public, folder, made / CURVES),
        license_is_bases=export.license_is_bases,
    )
    (made / CARD).write_text(card, encoding="utf-8")
    # Last, when every other file is as it will stay: by these hashes a later export knows that nothing was changed.
    files = {path.name: sha256_of_file(path) for path in sorted(made.iterdir())}
    write_json(made / SUMMARY, {**training.summary(), "files": files})
    # On the draft: if anything is found, the folder never gets its name.
    refuse_secrets(made, _local_paths(folder))
    return card


def stored_dtype(path: Path) -> str:
    """Return the dtype of the tensors in a safetensors file, several joined by ``and``.

    Raises:
        UserInputError: If it is not such a file.
    """
    try:
        found = {tensor.dtype for tensor in stored_tensors(path).values()}
    except (SafetensorError, OSError) as error:
        raise UserInputError(f"{path}: cannot be read ({error}). {MEND}") from error
    return " and ".join(sorted(DTYPES.get(name, name) for name in found))


def _write_weights(source: Path, target: Path, trained_dtype: str, dtype: str) -> None:
    """Copy an adapter's weights, rounded to ``float32`` or ``bfloat16`` if they are stored in another dtype."""
    # Copied byte for byte: the same adapter gives the same hash, and the Hub transfers nothing twice.
    if trained_dtype == dtype:
        shutil.copyfile(source, target)
        return
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(source).items()}
    # As PEFT writes it: readers may want to know for which framework a file is.
    save_file(tensors, target, metadata={"format": "pt"})


def _write_config(path: Path, config: dict[str, Any], base: PublicBase) -> dict[str, Any]:
    """Write ``adapter_config.json`` with a base that others can load."""
    # PEFT writes sets as lists, in an order that changes from run to run.
    public = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    public |= {"base_model_name_or_path": base.id, "revision": base.commit, "inference_mode": True}
    write_json(path, public, sort_keys=True)
    return public


def _write_tokenizer(folder: AdapterFolder, target: Path) -> bool:
    """Write the tokenizer that the adapter was trained with; for a checkpoint it is the base's.

    Returns:
        False if there is none beside the adapter and nothing is known of its training: readers then take the base's.
    """
    if (folder.path / "tokenizer_config.json").is_file():
        for name in TOKENIZER_FILES:
            if (folder.path / name).is_file():
                check_tokenizer_file(folder.path / name)
                shutil.copyfile(folder.path / name, target / name)
    elif folder.recipe is not None:
        tokenizer = tokenizer_of_adapter(folder)
        stated = folder.recipe.data.prompt_template
        if is_template_file(stated):
            # Published as the tokenizer's own, so that apply_chat_template gives the prompt of the training.
            tokenizer.chat_template = read_jinja(stated)
        save_tokenizer(tokenizer, target, revision=folder.base_revision)
    else:
        return False
    _drop_paths(target / TOKENIZER_CONFIG, _local_paths(folder))
    return True


def _drop_paths(path: Path, local: list[str]) -> None:
    """Drop paths of this machine, which some versions of transformers write; else the file stays as it is."""
    config = read_json(path)
    named = [key for key in PATH_KEYS if any(place in str(config.get(key, "")) for place in local)]
    kept = {key: value for key, value in config.items() if key not in named}
    if kept != config:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _prompts(folder: AdapterFolder, made: Path) -> tuple[Prompts, int | None]:
    """Return the prompts of the training, by the tokenizer that is published, and its end token."""
    tokenizer = load_tokenizer(str(made))
    return prompts_of(folder, tokenizer), tokenizer.eos_token_id


def _draw(records: Records, recipe: Recipe, folder: AdapterFolder, path: Path) -> bool:
    """Draw the curves again: the run's own picture is headed by the path of its base."""
    if records.log:
        return plot_losses(records.log, path, title(recipe))
    if Published.of(folder.summary).files is not None and (folder.path / CURVES).is_file():
        check_picture(folder.path / CURVES)
        shutil.copyfile(folder.path / CURVES, path)  # an export of an export
    return path.is_file()


def _local_paths(folder: AdapterFolder) -> list[str]:
    """Return absolute paths that a record of the run may hold."""
    recorded = folder.config.get("base_model_name_or_path") or ""
    stated = (folder.recipe.model.name_or_path if folder.recipe else None) or ""
    found = {str(folder.path.absolute()), str(folder.path.resolve()), str(Path.home()), str(Path.cwd())}
    found |= {path for path in (recorded, stated) if path.startswith(("/", "~"))}
    return sorted(path for path in found if len(path) > 1)
