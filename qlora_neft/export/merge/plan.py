"""The plan of a merge: base and adapter are found, opened and checked before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedConfig

from ...adapter.folder import AdapterFolder
from ...adapter.load import naming_the_base
from ...adapter.names import check_names
from ...adapter.weights import Update
from ...base.checkpoint import Checkpoint, skeleton
from ...base.config import check_base_config
from ...base.nf4 import from_nf4, nf4_config, to_nf4
from ...base.quantizer import in_nf4
from ...errors import UserInputError
from ...hub_client import download_errors, ready, why
from ...recipe.schema import Quantization
from ..inputs import OF_MODEL, refuse_links, refuse_links_of_adapter

DEQUANTIZED, ORIGINAL, NF4 = "dequantized", "original", "nf4"
STRATEGIES = (DEQUANTIZED, ORIGINAL, NF4)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# No .bin and no adapters: names that transformers itself writes, exactly, since the bars of a download print them.
BASE_FILES = [
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors",
]
NF4_BYTES = 0.53  # bytes of a weight in NF4: half, and its share of the block constants


@dataclass(frozen=True)
class Plan:
    """A merge that is ready to begin.

    Attributes:
        folder: The adapter.
        merge: Base and update.
        config: Configuration of the base.
        strategy: ``dequantized``, ``original`` or ``nf4``: which one is written.
        dtype: Dtype the weights are stored in.
    """

    folder: AdapterFolder
    merge: Merge
    config: PreTrainedConfig
    strategy: str
    dtype: torch.dtype

    def num_bytes(self) -> int:
        """Size of the merged weights, to within a percent."""
        sizes = {name: torch.Size(self.merge.base.shapes[name]).numel() for name in self.merge.base.parameters()}
        packed = self.merge.quantized if self.strategy == NF4 else frozenset()
        return sum(int(n * (NF4_BYTES if name in packed else self.dtype.itemsize)) for name, n in sizes.items())


def plan_merge(folder: AdapterFolder, strategy: str = DEQUANTIZED, dtype: str = "auto") -> Plan:
    """Open base and adapter, and check that they can be merged. No weight is read.

    Args:
        folder: The adapter.
        strategy: ``dequantized``, ``original`` or ``nf4``.
        dtype: ``bfloat16``, ``float16``, ``float32``, or ``auto``: bfloat16 if the base is stored in it, else float16.

    Raises:
        UserInputError: If they cannot be merged.
    """
    refuse_links_of_adapter(folder)
    check_names(folder)
    with naming_the_base(folder):
        config = check_base_config(folder.base, revision=folder.base_revision)
    # The configuration is checked before this, which may download gigabytes.
    place = _base_folder(folder)
    refuse_links(folder.base, place, OF_MODEL)
    base = Checkpoint(place, config, folder.base)
    # Trained on a base that was not quantized: every strategy would be the plain one.
    quantized = frozenset() if folder.quantization is None else quantized_names(base)
    shared = list(base.key_of.values())
    # Parameters that share a stored tensor: an update of one of them would change the other.
    tied = {name for name, key in base.key_of.items() if shared.count(key) > 1}
    # The adapter's matrices are those of a linear layer, (out, in), whichever way round the base stores its weight.
    shapes = {name: shape[::-1] if name in base.transposed else shape for name, shape in base.shapes.items()}
    # Of a stack of experts, (experts, out, in).
    shapes |= {name: (n, out, width) for name in base.turned_stacks for n, width, out in [base.shapes[name]]}
    update = Update(folder, shapes, set(quantized), tied)
    double_quant = folder.quantization is not None and folder.quantization.bnb_4bit_use_double_quant
    merge = Merge(base, update, quantized, double_quant)
    if strategy not in STRATEGIES:
        raise UserInputError(f"--strategy: must be one of {', '.join(STRATEGIES)}, got {strategy!r}.")
    if strategy not in merge.strategies:
        if strategy == NF4 and not quantized:
            raise UserInputError("--strategy: the adapter was trained on a base that was not quantized.")
        if strategy == NF4:
            raise UserInputError(f"--strategy: {folder.base} has experts, for which no format in NF4 exists.")
        raise UserInputError(f"--strategy: {folder.base} is stored in NF4, its original weights are not known.")
    if dtype not in ("auto", *DTYPES):
        raise UserInputError(f"--dtype: must be one of auto, {', '.join(DTYPES)}, got {dtype!r}.")
    # float16 rounds eight times more finely, but a model made in bfloat16 may overflow it when it runs.
    own = torch.bfloat16 if base.dtype == torch.bfloat16 else torch.float16
    return Plan(folder, merge, config, strategy, DTYPES.get(dtype, own))


@dataclass(frozen=True)
class Merge:
    """A base and the update of its weights.

    Attributes:
        base: Weights of the base.
        update: The adapter.
        quantized: Parameters that training holds in NF4. If only some layers have adapters, these are more than the
            parameters with an update.
        double_quant: Whether the constants of NF4 are quantized too.
    """

    base: Checkpoint
    update: Update
    quantized: frozenset[str]
    double_quant: bool

    @property
    def strategies(self) -> tuple[str, ...]:
        """Strategies that are possible: if the base is stored in NF4, its original weights are not known."""
        if self.base.stacks or not self.quantized:
            return (DEQUANTIZED, ORIGINAL)  # there is no format for experts in NF4, and none is asked for otherwise
        return (DEQUANTIZED, NF4) if self.base.stored_nf4 else STRATEGIES

    def exact(self, name: str, strategy: str) -> Tensor:
        """Return a merged weight in float32, before it is rounded for storage."""
        # modules_to_save: trained whole, so there is nothing to add to.
        trained = self.update.whole(name)
        if trained is not None:
            return trained.float()
        weight = self._turned(name, self.base.weight(name))
        if strategy != ORIGINAL and name in self.quantized and name not in self.base.stored_nf4:
            # The adapter was trained on these values, not on the ones in the file.
            weight = self._through_nf4(weight)
        weight = weight.float()
        delta = self.update.delta(name)
        if delta is not None and name in self.base.turned_stacks:
            delta = delta.transpose(1, 2)
        return self._turned(name, weight if delta is None else weight + delta)

    def _through_nf4(self, weight: Tensor) -> Tensor:
        if weight.dim() == 2:
            return from_nf4(to_nf4(weight, self.double_quant))
        # Of experts each has constants of its own.
        return torch.stack([from_nf4(to_nf4(matrix.contiguous(), self.double_quant)) for matrix in weight])

    def stored(self, name: str, strategy: str, dtype: torch.dtype) -> Tensor | Params4bit:
        """Return a merged weight as it is written to disk.

        Raises:
            UserInputError: If it does not fit ``dtype``.
        """
        if name not in self.quantized and not self.update.changes(name) and dtype == self.base.dtype:
            return self.base.weight(name)  # avoids a float32 copy of a large embedding
        weight = self.exact(name, strategy)
        if strategy == NF4 and name in self.quantized:
            return to_nf4(self._turned(name, weight), self.double_quant)
        # Rounded once, from the sum in float32.
        rounded = weight.to(dtype)
        if not rounded.isfinite().all() and weight.isfinite().all():
            raise UserInputError(
                f"--dtype: {name} holds {weight.abs().max():.3g}, {str(dtype).removeprefix('torch.')} ends at "
                f"{torch.finfo(dtype).max:g}. Use --dtype bfloat16."
            )
        return rounded

    def loaded(self, name: str, strategy: str, dtype: torch.dtype) -> Tensor:
        """Return the float32 values that a model computes with after loading what `stored` gives."""
        weight = self.stored(name, strategy, dtype)
        return self._turned(name, from_nf4(weight)) if isinstance(weight, Params4bit) else weight.float()

    def _turned(self, name: str, weight: Tensor) -> Tensor:
        """Turn a Conv1D's weight from (in, out) to (out, in), or back; others stay as they are."""
        return weight.T.contiguous() if name in self.base.transposed else weight


def quantized_names(base: Checkpoint) -> frozenset[str]:
    """Return the parameters that `load_nf4_base` holds in NF4, as transformers chooses them."""
    if base.stored_nf4:
        return frozenset(base.stored_nf4)
    # The loader's own choice of layers, not a list kept here: the merge must quantize exactly what training did.
    model = in_nf4(skeleton(base.model.config), nf4_config(Quantization(), torch.float32))
    layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    return frozenset(layers | base.stacks.keys())


def _base_folder(folder: AdapterFolder) -> Path:
    path = Path(folder.base).expanduser()
    if path.is_dir():
        return path
    ready()
    try:
        return Path(snapshot_download(folder.base, revision=folder.base_revision, allow_patterns=BASE_FILES))
    except download_errors() as error:
        raise UserInputError(f"{folder.base}: the base's weights cannot be fetched. ({why(error)})") from error
