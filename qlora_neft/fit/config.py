"""A base's configuration and the number of its weights, without its weights: shipped, local, or from the Hub."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..base.model_files import StoredTensor, stored_tensors
from ..errors import UserInputError, first_line
from .geometry import shipped_config


def read_config(name_or_path: str, revision: str = "main") -> tuple[dict[str, Any], str]:
    """The content of ``config.json`` and where it is from: ``shipped``, ``local`` or ``Hub``.

    Raises:
        UserInputError: If there is none, or the Hub cannot be reached.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return _local_config(folder), "local"
    if (config := shipped_config(name_or_path)) is not None:
        return config, "shipped"
    return _hub_config(name_or_path, revision), "Hub"


def stored_parameters(name_or_path: str, revision: str, origin: str) -> int | None:
    """Weights that a checkpoint really holds, from the headers of its safetensors files; None where that is unknown.

    From the Hub by range requests of a few kilobytes; a shipped configuration asks nobody.
    """
    if origin == "local":
        headers = [_header(path) for path in sorted(Path(name_or_path).expanduser().glob("*.safetensors"))]
        if not headers or any(header is None for header in headers):
            return None
        return sum(_weights(header) for header in headers if header is not None)
    return _hub_parameters(name_or_path, revision) if origin == "Hub" else None


def _local_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserInputError(
            f"model.name_or_path: no model configuration could be read from {str(folder)!r} ({error})."
        ) from error


def _hub_config(name: str, revision: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download  # only where the Hub has to be asked: it takes a third of a second
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return json.loads(Path(hf_hub_download(name, "config.json", revision=revision)).read_text(encoding="utf-8"))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserInputError(
            f"model.name_or_path: the configuration of {name!r} cannot be read from the Hub. Check its name, your "
            f"access and the network. ({first_line(error)})"
        ) from error


def _hub_parameters(name: str, revision: str) -> int | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        counts = HfApi().get_safetensors_metadata(name, revision=revision).parameter_count
    except (OSError, ValueError, HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError):
        return None
    return sum(counts.values())


def _header(path: Path) -> Mapping[str, StoredTensor] | None:
    try:
        return stored_tensors(path)
    except (OSError, SafetensorError):
        return None


def _weights(header: Mapping[str, StoredTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in header.values())
