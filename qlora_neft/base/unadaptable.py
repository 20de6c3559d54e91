"""Which linear layers cannot have LoRA, or not be packed, by what they are; the model need not have weights."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.func import functional_call

# PEFT refuses this module of these model types: their fused kernels read the weight itself, past the adapter
# (``peft.tuners.tuners_utils._check_lora_target_modules_mamba``).
MAMBA_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
MAMBA_MODULE = "out_proj"
NO_PLAIN_LAYER = "it is no plain linear layer: a router, or one of groups"
# Weights that their model takes for numbers: clamped in place in every training forward (``Gemma3nTextAltUp.predict``
# and ``correct``), or multiplied past their layer (``MambaMixer.slow_forward``).
TOUCHED = {"gemma3n_text": (".prediction_coefs", ".correction_coefs"), "mamba": (".dt_proj",)}


def unadaptable(model: nn.Module) -> dict[str, str]:
    """Return the linear layers that cannot have LoRA, by name, each with the reason."""
    found: dict[str, str] = {}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    unpacked = set(unpackable(model))
    asked: dict[type, str] = {}  # answers by class: a model has one router per layer
    for name, module in model.named_modules():
        ending = name.rsplit(".", 1)[-1]
        if name in unpacked:
            found[name] = "the model reads or clamps its weight itself"
        elif model_type in MAMBA_TYPES and ending == MAMBA_MODULE and isinstance(module, nn.Linear):
            found[name] = "a Mamba kernel reads its weight itself"
        elif isinstance(module, nn.Linear) and _has_own_forward(module):
            if type(module) not in asked:
                asked[type(module)] = _why_not_a_layer(module)
            if asked[type(module)]:
                found[name] = asked[type(module)]
    return found


def unpackable(model: nn.Module) -> list[str]:
    """Return the linear layers whose bytes their own model would take for numbers, so that they are not packed."""
    endings = TOUCHED.get(getattr(getattr(model, "config", None), "model_type", None) or "", ())
    return sorted(name for name, _ in model.named_modules() if endings and name.endswith(endings))


def _has_own_forward(module: nn.Linear) -> bool:
    kind = type(module)
    # bitsandbytes' and PEFT's layers are linear layers with a forward pass of their own.
    if kind.__module__.split(".")[0] in ("bitsandbytes", "peft", "qlora_neft"):
        return False
    return kind.forward is not nn.Linear.forward


def _why_not_a_layer(module: nn.Linear) -> str:
    """Say why a subclass of `nn.Linear` is no layer to PEFT; nothing if it maps features to features as one does."""
    meta = {name: param.to("meta") for name, param in module.named_parameters(recurse=False)}
    one = torch.empty(1, 1, module.in_features, device="meta", dtype=module.weight.dtype)
    arguments = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    if len(arguments) > 1:
        return "it takes more than one input"
    try:
        output = functional_call(module, meta, (one,))
    except (RuntimeError, NotImplementedError, ValueError, TypeError):  # it looks at values, as a router does
        return NO_PLAIN_LAYER
    is_layer = isinstance(output, Tensor) and output.shape == (1, 1, module.out_features)
    return "" if is_layer else NO_PLAIN_LAYER
