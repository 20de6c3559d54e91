"""What is to be merged: base and adapter found, opened and checked, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..base_config import check_base_config
from ..errors import UserInputError
from ..trained import AdapterFolder
from ..trained.tokenizer import naming_the_base
from .checkpoint import Checkpoint
from .strategies import DEQUANTIZED, NF4, STRATEGIES, Merge, quantized_names
from .update import Update

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BASE_FILES = ["*.json", "model.safetensors", "model-*.safetensors"]


@dataclass(frozen=True)
class Plan:
    """A merge that is ready to begin.

    Attributes:
        folder: The adapter.
        merge: Base and update.
        config: The base's configuration.
        strategy: Which of the three is written.
        dtype: What weights are stored in.
    """

    folder: AdapterFolder
    merge: Merge
    config: Any
    strategy: str
    dtype: torch.dtype

    def num_bytes(self) -> int:
        """Of the merged weights, to a percent."""
        sizes = {name: torch.Size(self.merge.base.shapes[name]).numel() for name in self.merge.base.parameters()}
        packed = self.merge.quantized if self.strategy == NF4 else frozenset()
        return sum(int(n * (0.53 if name in packed else self.dtype.itemsize)) for name, n in sizes.items())


def plan_merge(folder: AdapterFolder, strategy: str = DEQUANTIZED, dtype: str = "auto") -> Plan:
    """Open base and adapter, and check that they can be merged. No weight is read.

    Args:
        folder: The adapter.
        strategy: ``dequantized``, ``original`` or ``nf4``.
        dtype: ``bfloat16``, ``float16``, ``float32``; ``auto``: bfloat16 where the base is stored in it, else float16.

    Raises:
        UserInputError: If they cannot.
    """
    with naming_the_base(folder):
        config = check_base_config(folder.base, revision=folder.base_revision)
    base = Checkpoint(_base_folder(folder), config, folder.base)
    quantized = quantized_names(base)
    shared = list(base.key_of.values())
    tied = {name for name, key in base.key_of.items() if shared.count(key) > 1}
    update = Update(folder, base.shapes, set(quantized), tied)
    merge = Merge(base, update, quantized, _double_quant(folder))
    if strategy not in STRATEGIES:
        raise UserInputError(f"--strategy: must be one of {', '.join(STRATEGIES)}, got {strategy!r}.")
    if strategy not in merge.strategies:
        raise UserInputError(f"--strategy: {folder.base} is stored in NF4, its original weights are not known.")
    if dtype not in ("auto", *DTYPES):
        raise UserInputError(f"--dtype: must be one of auto, {', '.join(DTYPES)}, got {dtype!r}.")
    own = torch.bfloat16 if base.dtype == torch.bfloat16 else torch.float16
    return Plan(folder, merge, config, strategy, DTYPES.get(dtype, own))


def _double_quant(folder: AdapterFolder) -> bool:
    return (folder.recipe or {}).get("quantization", {}).get("bnb_4bit_use_double_quant", True)


def _base_folder(folder: AdapterFolder) -> Path:
    path = Path(folder.base).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(folder.base, revision=folder.base_revision, allow_patterns=BASE_FILES))
    except OSError as error:  # every error of the Hub's client and of the network below it
        first_line = str(error).strip().splitlines()[0]
        raise UserInputError(f"{folder.base}: the base's weights cannot be fetched. ({first_line})") from error
