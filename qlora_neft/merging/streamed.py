"""A model that computes with weights fetched layer by layer, so that it need not fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Streamed:
    """Computes with a skeleton whose weights come, one module at a time, from a function.

    Args:
        model: Without weights, see `checkpoint.skeleton`; to be used by this object alone.
        weight: A parameter's value by its name, float32.
        device: Where it computes.
        keep: Whether weights stay once they are fetched; else each is dropped after its use.
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
        """Logits, (B, T, V), float32."""
        return self.model(**inputs, use_cache=False).logits

    def close(self) -> None:
        """Drop every weight."""
        for module in self.model.modules():
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                _drop(module, name)

    def _attach(self, module: nn.Module, names: dict[str, str]) -> None:
        def fetch(*_: Any) -> None:
            for own, full in names.items():
                if module._parameters[own].is_meta:
                    value = self._weight(full).to(self._device, torch.float32)
                    module._parameters[own] = nn.Parameter(value, requires_grad=False)

        def drop(*_: Any) -> None:
            for own in () if self._keep else names:
                _drop(module, own)

        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)


def _drop(module: nn.Module, name: str) -> None:
    module._parameters[name] = nn.Parameter(module._parameters[name].to("meta"), requires_grad=False)
