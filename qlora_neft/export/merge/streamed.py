"""A model that fetches its weights one module at a time, so that it computes in the memory of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Streamed:
    """A skeleton that computes with the weights a function gives.

    Args:
        model: A model without weights, see `skeleton`; nothing else may use it.
        weight: Returns a parameter by its name, in float32.
        device: Device to compute on.
        keep: Whether fetched weights stay; else each is dropped after its module has run.
    """

    def __init__(
        self, model: PreTrainedModel, weight: Callable[[str], Tensor], device: torch.device, *, keep: bool
    ) -> None:
        self.model, self._weight, self._device, self._keep = model, weight, device, keep
        for prefix, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
            names = [name for name, _ in module.named_parameters(recurse=False)]
            if names:
                self._attach(module, {name: f"{prefix}.{name}" if prefix else name for name in names})

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Tensor:
        """Return the logits, (B, T, V), float32."""
        return self.model(**inputs, use_cache=False).logits

    def close(self) -> None:
        """Drop every weight."""
        for module in self.model.modules():
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                _drop(module, name)

    def _attach(self, module: nn.Module, names: dict[str, str]) -> None:
        """Let a module fetch its parameters before it runs; ``names`` has their names in the whole model."""

        def fetch(*_: Any) -> None:
            for own, full in names.items():
                if module.get_parameter(own).is_meta:
                    value = self._weight(full).to(self._device, torch.float32)
                    module._parameters[own] = nn.Parameter(value, requires_grad=False)

        def drop(*_: Any) -> None:
            for own in () if self._keep else names:
                _drop(module, own)

        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)


def _drop(module: nn.Module, name: str) -> None:
    module._parameters[name] = nn.Parameter(module.get_parameter(name).to("meta"), requires_grad=False)
