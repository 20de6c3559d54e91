"""What is to be merged: base and adapter found, opened and checked, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from ...adapter.folder import AdapterFolder
from ...adapter.load import naming_the_base
from ...adapter.weights import Update
from ...base.checkpoint import Checkpoint, skeleton
from ...base.config import check_base_config
from ...base.nf4 import from_nf4, nf4_config, to_nf4
from ...errors import UserInputError, first_line
from ...recipe.schema import Quantization

DEQUANTIZED, ORIGINAL, NF4 = "dequantized", "original", "nf4"
STRATEGIES = (DEQUANTIZED, ORIGINAL, NF4)


@dataclass(frozen=True)
class Merge:
    """A base and an update.

    Attributes:
        base: The base's weights.
        update: The adapter.
        quantized: Parameters that are in NF4 in training: more than those with an update, where only some layers have
            adapters.
        double_quant: Whether their constants are quantized as well.
    """

    base: Checkpoint
    update: Update
    quantized: frozenset[str]
    double_quant: bool

    @property
    def strategies(self) -> tuple[str, ...]:
        """Those there are: of a base stored in NF4, the original weights are not known."""
        return (DEQUANTIZED, NF4) if self.base.stored_nf4 else STRATEGIES

    def exact(self, name: str, strategy: str) -> Tensor:
        """A merged weight in float32, before it is rounded to what is stored."""
        trained = self.update.whole(name)
        if trained is not None:
            return trained.float()
        weight = self.base.weight(name)
        if strategy != ORIGINAL and name in self.quantized and name not in self.base.stored_nf4:
            weight = from_nf4(to_nf4(weight, self.double_quant))
        weight = weight.float()
        delta = self.update.delta(name)
        return weight if delta is None else weight + delta

    def stored(self, name: str, strategy: str, dtype: torch.dtype) -> Tensor | Params4bit:
        """A merged weight as it is written.

        Raises:
            UserInputError: If ``dtype`` has no room for it.
        """
        if name not in self.quantized and not self.update.changes(name) and dtype == self.base.dtype:
            return self.base.weight(name)  # no float32 copy of a large embedding
        weight = self.exact(name, strategy)
        if strategy == NF4 and name in self.quantized:
            return to_nf4(weight, self.double_quant)
        rounded = weight.to(dtype)
        if not rounded.isfinite().all() and weight.isfinite().all():
            raise UserInputError(
                f"--dtype: {name} holds {weight.abs().max():.3g}, {str(dtype).removeprefix('torch.')} ends at "
                f"{torch.finfo(dtype).max:g}. Use --dtype bfloat16."
            )
        return rounded

    def loaded(self, name: str, strategy: str, dtype: torch.dtype) -> Tensor:
        """What a model computes with that has loaded `stored`, in float32."""
        weight = self.stored(name, strategy, dtype)
        return from_nf4(weight) if isinstance(weight, Params4bit) else weight.float()


def quantized_names(base: Checkpoint) -> frozenset[str]:
    """Parameters that `load_nf4_base` holds in NF4, by transformers' own choice."""
    if base.stored_nf4:
        return frozenset(base.stored_nf4)
    return frozenset(f"{name}.weight" for name, m in _replaced(base.model).named_modules() if isinstance(m, Linear4bit))


def _replaced(model: PreTrainedModel) -> PreTrainedModel:
    copy = skeleton(model.config)
    quantizer = AutoHfQuantizer.from_config(nf4_config(Quantization(), torch.float32))
    quantizer.preprocess_model(model=copy, device_map={"": "cpu"})
    return copy


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
        raise UserInputError(f"{folder.base}: the base's weights cannot be fetched. ({first_line(error)})") from error
