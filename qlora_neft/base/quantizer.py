"""How transformers loads a base in NF4 here: its bitsandbytes quantizer, which also quantizes what that one leaves out.

Beyond ``nn.Linear`` it takes fused experts (`.experts`) and linear layers of a class of their own, and it leaves out
routers. Weights are quantized parameter by parameter while they are loaded, on their device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationMethod

from .expert_names import DOWN, UP_NAMES
from .experts import (
    QuantizedExperts,
    expert_modules,
    expert_weights,
    is_fused_experts,
    pack,
    quantize_experts,
    quantized_class,
    store,
)
from .unadaptable import unpackable

METHOD = "qlora_neft_nf4"
# Subclasses of nn.Linear whose own forward computes what nn.Linear's does: Falcon's keeps the rounding of two steps.
LINEAR_CLASSES = ("FalconLinear",)


@register_quantization_config(METHOD)
class Nf4Config(BitsAndBytesConfig):
    """bitsandbytes' configuration under a name of its own, by which transformers finds `Nf4Quantizer`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quant_method = METHOD  # ty: ignore[invalid-assignment]  # an enumeration of upstream's own methods

    @classmethod
    def of(cls, config: BitsAndBytesConfig) -> Nf4Config:
        """Return the same settings under our name."""
        values = config.to_dict()
        return cls(**{key: value for key, value in values.items() if key != "quant_method" and key[0] != "_"})

    def plain(self) -> BitsAndBytesConfig:
        """Return the same settings as bitsandbytes', for the model that is loaded."""
        values = self.to_dict()
        return BitsAndBytesConfig(**{k: v for k, v in values.items() if k != "quant_method" and k[0] != "_"})


@register_quantizer(METHOD)
class Nf4Quantizer(Bnb4BitHfQuantizer):
    """transformers' NF4, extended to fused experts and to linear layers of other classes."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any, **kwargs: Any) -> None:
        make_plain_linears(model)
        super()._process_model_before_weight_loading(model, device_map, **kwargs)

    @staticmethod
    def get_modules_to_not_convert(model: PreTrainedModel, *args: Any, **kwargs: Any) -> list[str]:
        """Return upstream's choice and the routers, whose small errors would send tokens to other experts.

        So are layers left out that their model overwrites, see `unpackable`.
        """
        return [*HfQuantizer.get_modules_to_not_convert(model, *args, **kwargs), *routers(model), *unpackable(model)]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is quantized when it is loaded."""
        if super().param_needs_quantization(model, param_name, **kwargs):
            return True
        module, name = get_module_from_name(model, param_name)
        # Half loaded, one of its stacks is packed already and its shape says nothing; upstream asks once more before it
        # puts the second one there.
        is_experts = "matrix_shapes" in module.__dict__ or is_fused_experts(module)
        return is_experts and name in (*UP_NAMES, DOWN)

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        """Return the operation that quantizes one loaded parameter."""
        return _Quantize(self)

    def is_serializable(self) -> bool:
        """Whether the quantized base can be saved: there is no format for packed experts."""
        return not self.has_experts

    @property
    def has_experts(self) -> bool:
        """Whether experts were quantized."""
        return getattr(self, "_has_experts", False)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # From here on everybody else sees an ordinary bitsandbytes model.
        for module in model.modules():
            if "matrix_shapes" in module.__dict__:
                quantized_class(module)
                self._has_experts = True
        assert isinstance(self.quantization_config, Nf4Config), "registered for it alone"
        self.quantization_config = self.quantization_config.plain()
        model.config.quantization_config = self.quantization_config
        setattr(model, "quantization_method", QuantizationMethod.BITS_AND_BYTES)  # noqa: B010  as upstream, for checkers
        return super()._process_model_after_weight_loading(model, **kwargs)


class _Quantize(Bnb4bitQuantize):
    """Quantizes a loaded linear weight as upstream does, and a stack of experts' matrices one by one."""

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        result = {}
        for name, value in input_dict.items():
            module, own = get_module_from_name(model, name)
            if isinstance(module, Linear4bit):
                result |= super().convert({name: value}, *args, model=model, **kwargs)
                continue
            stack = value[0] if isinstance(value, list) else value
            double_quant = self.hf_quantizer.quantization_config.bnb_4bit_use_double_quant
            result[name] = store(module, own, pack(stack, double_quant=double_quant))
        return result


def make_plain_linears(model: nn.Module) -> None:
    """Let linear layers of other classes be plain ones, which bitsandbytes replaces; the model has no weights yet."""
    for module in model.modules():
        if is_other_linear(module):
            module.__class__ = nn.Linear


def is_other_linear(module: nn.Module) -> bool:
    """Whether a module is of a subclass of nn.Linear that computes the same."""
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind is nn.Linear or isinstance(module, Linear4bit):
        return False
    return kind.__name__ in LINEAR_CLASSES or kind.forward is nn.Linear.forward


def routers(model: nn.Module) -> list[str]:
    """Return the linear layers that choose experts, or weigh a shared one; routers of other classes are not linear."""
    return sorted(name for name, _ in _router_layers(model))


def _router_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for parent, block in model.named_modules():
        children = dict(block.named_children())
        # A mixture's block holds experts; they are one module, fused, or a list.
        if not any("experts" in name for name in children):
            continue
        for name, child in block.named_modules():
            last = name.rpartition(".")[2]
            is_router = last in ("gate", "router", "shared_expert_gate", "router_gate") or "router" in name.split(".")
            if isinstance(child, nn.Linear) and is_router and "experts" not in name.split("."):
                yield f"{parent}.{name}" if parent else name, child


def in_nf4(model: PreTrainedModel, config: BitsAndBytesConfig) -> PreTrainedModel:
    """Turn a model on the meta device into what would be loaded in NF4, still without weights; it is changed.

    Linear layers become bitsandbytes' (their weights not packed yet), fused experts have packed bytes and constants.
    """
    quantizer = Nf4Quantizer(Nf4Config.of(config))
    quantizer.preprocess_model(model, device_map={"": "meta"})
    for _, module in list(expert_modules(model)):
        for name in expert_weights(module):
            stack = getattr(module, name)
            setattr(module, name, store(module, name, pack(stack, double_quant=config.bnb_4bit_use_double_quant)))
    model.config.quantization_config = quantizer.quantization_config
    quantizer._process_model_after_weight_loading(model)
    return model


def quantize_leftovers(model: PreTrainedModel, *, double_quant: bool) -> None:
    """Quantize what a checkpoint stored in NF4 keeps in 16 bits and this project would have quantized: its experts."""
    left = [module for _, module in expert_modules(model) if not isinstance(module, QuantizedExperts)]
    with torch.no_grad():
        quantize_experts(left, double_quant=double_quant)
