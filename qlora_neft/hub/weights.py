"""The adapter's own file: copied byte for byte, or written in another dtype."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import UserInputError
from ..trained.folder import MEND

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
