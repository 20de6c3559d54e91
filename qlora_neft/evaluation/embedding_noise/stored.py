"""The input embedding of a checkpoint, read alone: one tensor of its safetensors files, and no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...base_config import check_base_config
from ...errors import UserInputError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_embedding(name_or_path: str, *, revision: str | None = None) -> Tensor:
    """Read the input embedding of a causal language model.

    Of a checkpoint in shards only the shard that holds it is read, and fetched from the Hub.

    Args:
        name_or_path: Hub id or directory.
        revision: Hub branch, tag or commit.

    Returns:
        The table (V, D), in the dtype it is stored in, on the CPU.

    Raises:
        UserInputError: If there is no such model, no safetensors file, or no such tensor in it.
    """
    name, shape = _name_and_shape(name_or_path, revision)
    files = _tensor_files(name_or_path, revision)
    key = _stored_name(name, files, name_or_path)
    path = _file(name_or_path, files[key], revision)
    try:
        with safe_open(path, framework="pt") as tensors:
            table = tensors.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise UserInputError(f"{name_or_path}: {path.name} cannot be read ({error}).") from error
    if not table.is_floating_point() or table.dim() != 2 or table.shape[1] != shape[1]:
        raise UserInputError(
            f"{name_or_path}: {key} must be a table of {shape[1]} floating-point columns, it is "
            f"{tuple(table.shape)} of {table.dtype}. Start from the original 16-bit checkpoint."
        )
    return table


def _name_and_shape(name_or_path: str, revision: str | None) -> tuple[str, torch.Size]:
    """As transformers calls the embedding of this architecture; the model is built without memory for weights."""
    config = check_base_config(name_or_path, **({"revision": revision} if revision else {}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weight = model.get_input_embeddings().weight
    return next(name for name, param in model.named_parameters() if param is weight), weight.shape


def _tensor_files(source: str, revision: str | None) -> Mapping[str, str]:
    """Tensor names and the file each is in."""
    index = _file(source, INDEX, revision, optional=True)
    try:
        if index is not None:
            return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        with safe_open(_file(source, SINGLE, revision), framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), SINGLE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, UserInputError):
            raise
        raise UserInputError(f"{source}: {(index or Path(SINGLE)).name} cannot be read ({error}).") from error


def _stored_name(name: str, files: Mapping[str, str], source: str) -> str:
    """What the checkpoint calls it: old ones lack the outermost module's name, multimodal ones order it otherwise."""
    if name in files:
        return name
    ending = ".".join(name.split(".")[-2:])
    found = [key for key in files if key == ending or key.endswith(f".{ending}")]
    if len(found) != 1:
        raise UserInputError(
            f"{source}: the checkpoint must hold one input embedding, {name}; it holds {', '.join(found) or 'none'}."
        )
    return found[0]


def _file(source: str, name: str, revision: str | None, *, optional: bool = False) -> Path | None:
    """A file of the checkpoint; None where an optional one is not there."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if (folder / name).is_file():
            return folder / name
        if optional:
            return None
        raise UserInputError(f"{source}: holds no {name}. Save the weights as safetensors (save_pretrained does).")
    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except EntryNotFoundError as error:  # not in the repository; offline, not in the cache
        if optional:
            return None
        raise UserInputError(
            f"{source}: the Hub has no {name} of it that could be fetched. ({_line(error)})"
        ) from error
    except OSError as error:
        raise UserInputError(f"{source}: {name} cannot be fetched from the Hub. ({_line(error)})") from error


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
