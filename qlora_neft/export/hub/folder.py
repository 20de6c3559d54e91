"""The folder that is published: whole before it is moved there; from the same adapter the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...adapter.folder import CONFIG, MEND, RECIPE, WEIGHTS, AdapterFolder
from ...adapter.load import tokenizer_of_adapter
from ...adapter.prompts import Prompts, template_of
from ...data.templates import read_jinja
from ...display.console import title
from ...display.plots import plot_losses
from ...errors import RunFailed, UserInputError
from ...files import read_json, sha256_of_file, whole_folder, write_json
from ...paths import JINJA_SUFFIXES
from .base import BaseFacts
from .card import card_data, render_card, snippets
from .records import Records, public_recipe, read_records, training_summary

SUMMARY = "training_summary.json"
FILES_KEY = "files"  # in the summary: SHA-256 of every other file


def sha256_of_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an export but its summary, by name."""
    return {path.name: sha256_of_file(path) for path in sorted(folder.iterdir()) if path.name != SUMMARY}


def check_replaceable(output: Path) -> None:
    """Refuse a folder that holds anything but an export as it was written.

    Raises:
        UserInputError: With what would be lost.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserInputError(f"--output: {str(output)!r} is no folder. Give a new one.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    written = _written(output)
    if written is None:
        raise UserInputError(
            f"--output: {str(output)!r} is not empty and holds no export; nothing in it may be lost. Give a new folder."
        )
    there = {path.name: sha256_of_file(path) for path in output.iterdir() if path.is_file() and path.name != SUMMARY}
    folders = [path.name for path in output.iterdir() if path.is_dir()]
    changed = sorted({name for name, sha256 in there.items() if written.get(name) != sha256} | set(folders))
    if changed:
        raise UserInputError(
            f"--output: {str(output)!r} was changed since it was exported ({', '.join(changed)}), and the change would "
            "be lost. Remove the folder or give another. To publish it as it is: hf upload"
        )


def _written(output: Path) -> dict[str, str] | None:
    try:
        files = read_json(output / SUMMARY).get(FILES_KEY)
    except (OSError, ValueError, AttributeError):
        return None
    return files if isinstance(files, dict) else None


TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
OURS = ("README.md", "adapter_config.json", "recipe.yaml", "training_summary.json")  # a vocabulary may hold "/home"


def refuse_secrets(folder: Path, local_paths: Iterable[str]) -> None:
    """Look for tokens in every file but the weights, and for paths in the files that are written here.

    Args:
        folder: About to be published.
        local_paths: Absolute paths that must not stand in it.

    Raises:
        UserInputError: If there is a token, with the file's name; the token is not repeated.
        RunFailed: If there is a path.
    """
    tokens = [token.encode() for token in _own_tokens()]
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == WEIGHTS:
            continue
        content = path.read_bytes()
        if TOKEN.search(content) or any(token in content for token in tokens):
            raise UserInputError(
                f"{path.name}: holds an access token of the Hub, which must not be published. Remove it from the file "
                "it came from, and revoke it on the Hub."
            )
        found = [local for local in local_paths if path.name in OURS and _names(content, local)]
        if found:
            raise RunFailed(
                f"{path.name} would publish the path {found[0]!r}; nothing was written. Please report this."
            )


def _names(content: bytes, path: str) -> bool:
    """Whether a path stands in a text: ``/data`` does not in ``huggingface.co/datasets``."""
    return re.search(rb"(?<![\w.])" + re.escape(path.encode()) + rb"(?![\w-])", content) is not None


def _own_tokens() -> list[str]:
    from huggingface_hub import get_token

    found = [os.environ.get(name, "").strip() for name in TOKEN_VARIABLES]
    return [token for token in [*found, get_token() or ""] if len(token) >= 8]


NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def stored_dtype(path: Path) -> str:
    """Dtype of the tensors in a safetensors file, several joined by ``and``.

    Raises:
        UserInputError: If it is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise UserInputError(f"{path}: cannot be read ({error}). {MEND}") from error
    return " and ".join(sorted(NAMES.get(name, name) for name in found))


def write_weights(source: Path, target: Path, dtype: str) -> None:
    """Copy an adapter's weights, rounded to ``float32`` or ``bfloat16`` if they are stored in another dtype."""
    if stored_dtype(source) == dtype:
        shutil.copyfile(source, target)
        return
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(source).items()}
    save_file(tensors, target, metadata={"format": "pt"})


FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
PATH_KEYS = ("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file")


def write_tokenizer(folder: AdapterFolder, target: Path) -> bool:
    """Write the tokenizer that the adapter was trained with; of a checkpoint it is the base's.

    Returns:
        False if none lies beside the adapter and nothing is known of its training: readers then take the base's.
    """
    if (folder.path / "tokenizer_config.json").is_file():
        for name in FILES:
            if (folder.path / name).is_file():
                shutil.copyfile(folder.path / name, target / name)
    elif folder.recipe is not None:
        tokenizer = tokenizer_of_adapter(folder)
        stated = folder.recipe.data.prompt_template
        if stated.endswith(JINJA_SUFFIXES):
            tokenizer.chat_template = read_jinja(stated)
        tokenizer.save_pretrained(target)
    else:
        return False
    _drop_paths(target / "tokenizer_config.json")
    return True


def _drop_paths(path: Path) -> None:
    config = read_json(path)
    kept = {key: value for key, value in config.items() if key not in PATH_KEYS}
    if kept != config:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        with whole_folder(output) as draft:
            card = _fill(draft, folder, export)
    except OSError as error:
        raise UserInputError(
            f"--output: {str(output)!r} cannot be written ({error.strerror}). Give another folder."
        ) from error
    return card


def _fill(made: Path, folder: AdapterFolder, export: Export) -> str:
    records = read_records(folder)
    own_recipe = folder.recipe.to_dict() if folder.recipe else None
    recipe = public_recipe(own_recipe, *export.base) if own_recipe else None
    trained = stored_dtype(folder.path / WEIGHTS)
    dtype = export.dtype or trained
    write_weights(folder.path / WEIGHTS, made / WEIGHTS, dtype)
    config = _write_config(made / CONFIG, folder.config, export.base)
    has_tokenizer = write_tokenizer(folder, made)
    if recipe is not None:
        (made / RECIPE).write_text(export.write_recipe(recipe), encoding="utf-8")
    has_curves = recipe is not None and _draw(records, recipe, folder, made / CURVES)
    weights = {"dtype": dtype, "trained_dtype": trained}
    summary = training_summary(records, own_recipe, export.base, weights)
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
    write_json(path, public, sort_keys=True)
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
    from ...base.config import load_tokenizer

    tokenizer = load_tokenizer(str(made))
    return Prompts(tokenizer, template_of(folder, tokenizer)), tokenizer.eos_token_id


def _local_paths(folder: AdapterFolder) -> list[str]:
    """Absolute paths that a record of the run may hold."""
    recorded = folder.config.get("base_model_name_or_path") or ""
    stated = (folder.recipe.model.name_or_path if folder.recipe else None) or ""
    found = {str(folder.path.absolute()), str(folder.path.resolve()), str(Path.home()), str(Path.cwd())}
    found |= {path for path in (recorded, stated) if path.startswith(("/", "~"))}
    return sorted(path for path in found if len(path) > 1)
