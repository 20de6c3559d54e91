"""LoRA on fused experts in NF4, in PEFT's own layout: an adapter saved here loads wherever PEFT's does.

PEFT adapts a 3-D parameter by a `ParamWrapper` that adds ``B A`` to the weight, which needs the weight in 16 bits and
leaves no input to drop out. Here the update is applied to the expert's input, as for a linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.nn.functional import linear

from .experts import Pairs, QuantizedExperts


class ParamWrapper(peft_layer.ParamWrapper):
    """LoRA of one packed parameter of `QuantizedExperts`; wrappers of several parameters lie one in the other.

    The name is PEFT's, by which it recognizes wrappers that it may nest.

    Args:
        base_layer: The experts, or a wrapper of another of their parameters.
        adapter_name: As in PEFT.
        parameter_name: The packed parameter.
        config: As in PEFT; unlike there, with dropout.
        kwargs: As in PEFT.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, parameter_name, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    # Makes the dropout mask of a training step, (pairs, in), scaled; None where it knows no better than chance.
    mask: Callable[[Tensor, Pairs, float], Tensor | None] | None = None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add or renew an adapter, as PEFT does; its dropout acts on the experts' inputs."""
        super().update_layer(adapter_name, r, lora_alpha, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def _set_dropout(self, adapter_name: str, config: LoraConfig) -> None:
        if config.lora_dropout > 0:
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    @property
    def experts(self) -> QuantizedExperts:
        """The experts."""
        experts = self.get_base_layer()
        assert isinstance(experts, QuantizedExperts), "PEFT is told to use this wrapper for them alone"
        return experts

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        # PEFT reads the parameter's shape, which here is that of its bytes. It swaps the two itself.
        self.num_experts, self._param_ndim = self.experts.num_experts, 3
        rows, columns = self.experts.matrix_shapes[self.parameter_name]
        return rows, columns

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the experts with this wrapper's update added to the products of its parameter."""
        self._check_forward_args(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        with self.experts.adapted(self.parameter_name, self):
            return self.base_layer(x, *args, **kwargs)

    def update(self, rows: Tensor, pairs: Pairs) -> Tensor:
        """Return ``scaling * B A dropout(rows)`` of each pair's expert, (pairs, in) to (pairs, out)."""
        result: Tensor | None = None
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            lora_a, lora_b = self.factors(name)
            dropped = self._dropped(rows, pairs, name)
            if not torch.is_autocast_enabled(rows.device.type):
                dropped = dropped.to(lora_a[0].dtype)
            if self._is_crossed:
                lora_a, lora_b = tuple(b.t() for b in lora_b), tuple(a.t() for a in lora_a)
            pieces = [linear(linear(part, lora_a[e]), lora_b[e]) for e, part in pairs.by_expert(dropped)]
            out = torch.cat(pieces) if pieces else rows.new_zeros(0, len(lora_b[0]))
            out = out * self.scaling[name]
            result = out if result is None else result + out
        assert result is not None, "an adapter is active"
        return result

    @property
    def _is_crossed(self) -> bool:
        """Whether PEFT takes the matrices for (out, in) although they are (in, out): B, at zero, then comes first."""
        return self.experts.layout.turned and not getattr(self.experts, "is_transposed", False)

    def _dropped(self, rows: Tensor, pairs: Pairs, name: str) -> Tensor:
        dropout = self.lora_dropout[name]
        if not self.training or not isinstance(dropout, nn.Dropout):
            return rows
        mask = None if self.mask is None else self.mask(rows, pairs, dropout.p)
        return dropout(rows) if mask is None else rows * mask

    def factors(self, adapter_name: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return every expert's A (r, in) and B (out, r).

        PEFT stores them side by side: A as (experts * r, in), B as (out, r * experts) with the experts innermost.
        """
        a, b = (cast(nn.Linear, matrices[adapter_name]).weight for matrices in (self.lora_A, self.lora_B))
        stacked = b.view(b.shape[0], -1, self.num_experts).permute(2, 0, 1)  # (experts, out, r)
        # unbind, not indexing: its backward pass writes one gradient, not one of full size for every expert.
        return a.view(self.num_experts, -1, a.shape[1]).unbind(0), stacked.unbind(0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: packed bytes cannot take an update.

        Raises:
            ValueError: Always.
        """
        raise ValueError("The experts are in NF4, which LoRA cannot be merged into. Use `qlora-neft merge`.")


def is_expert_lora(module: object) -> bool:
    """Whether a module is the LoRA of fused experts in NF4."""
    return isinstance(module, ParamWrapper)


def _without_dropout(config: LoraConfig) -> LoraConfig:
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


def for_experts(config: LoraConfig) -> LoraConfig:
    """Tell PEFT to adapt quantized experts by the wrapper here; the configuration is changed and returned."""
    config._register_custom_module({QuantizedExperts: ParamWrapper})
    return config
