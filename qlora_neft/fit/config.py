"""A base's configuration and the number of its weights, without its weights: shipped, local, or from the Hub.

huggingface_hub is imported only where the Hub has to be asked: it takes a noticeable part of the time in which a
shipped recipe is answered.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..base.model_files import adapter_base, stored_tensors
from ..errors import UserInputError, first_line
from ..files import read_json
from .geometry import shipped_config


def read_config(name_or_path: str, revision: str = "main") -> tuple[dict[str, Any], str]:
    """Return the content of ``config.json``, and where it is from: ``shipped``, ``local`` or ``Hub``.

    Raises:
        UserInputError: If there is none, or the Hub cannot be reached.
    """
    # A folder wins over a Hub id of the same name, as in transformers.
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return _local_config(folder), "local"
    # Before the Hub is asked: a well-known base is answered offline, and a gated one without access to it.
    if (config := shipped_config(name_or_path)) is not None:
        return config, "shipped"
    return _hub_config(name_or_path, revision), "Hub"


def stored_parameters(name_or_path: str, revision: str, origin: str) -> int | None:
    """Return the number of weights a checkpoint really holds, from the headers of its safetensors files.

    On the Hub these are range requests of a few kilobytes.

    Args:
        name_or_path, revision: The base.
        origin: As `read_config` says; for a shipped configuration nothing is asked.

    Returns:
        The number, or None if it is unknown.
    """
    if origin == "local":
        return _local_parameters(Path(name_or_path).expanduser())
    return _hub_parameters(name_or_path, revision) if origin == "Hub" else None


def _local_config(folder: Path) -> dict[str, Any]:
    if (base := adapter_base(str(folder))) is not None:
        raise UserInputError(
            f"model.name_or_path: {str(folder)!r} is an adapter of {base or 'no known base'}, not a model. To go on "
            f"training from it, write model.adapter: {folder} in its place."
        )
    try:
        return read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise UserInputError(
            f"model.name_or_path: no model configuration could be read from {str(folder)!r} ({error})."
        ) from error


def _hub_config(name: str, revision: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return read_json(Path(hf_hub_download(name, "config.json", revision=revision)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserInputError(
            f"model.name_or_path: the configuration of {name!r} cannot be read from the Hub. Check its name, your "
            f"access and the network. ({first_line(error)})"
        ) from error


def _local_parameters(folder: Path) -> int | None:
    files = sorted(folder.glob("*.safetensors"))
    try:
        tensors = [tensor for path in files for tensor in stored_tensors(path).values()]
    # The number only adds a note to the report, so a damaged file is no reason to end here.
    except (OSError, SafetensorError):
        return None
    return sum(math.prod(tensor.shape) for tensor in tensors) if files else None


def _hub_parameters(name: str, revision: str) -> int | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        counts = HfApi().get_safetensors_metadata(name, revision=revision).parameter_count
    # Likewise: not safetensors, no access or no network leave the number unknown.
    except (OSError, ValueError, HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError):
        return None
    return sum(counts.values())
