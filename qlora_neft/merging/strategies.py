"""The three ways to put an update on a base: what each makes of one weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from ..errors import UserInputError
from ..quantization import nf4_config
from .checkpoint import Checkpoint, from_nf4, skeleton, to_nf4
from .update import Update, finite

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
        if not finite(rounded) and finite(weight):
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
    quantizer = AutoHfQuantizer.from_config(nf4_config(torch.float32))
    quantizer.preprocess_model(model=copy, device_map={"": "cpu"})
    return copy
