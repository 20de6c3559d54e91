"""The load-balancing loss of a mixture of experts, over a whole optimizer step.

``num_experts * sum_e f_e P_e``: f_e counts how often expert e was chosen, P_e sums its probability, both per token and
layer. Upstream takes both from one micro-batch, so that its size changes what is learned: a product of means is not the
mean of products. Here f, which carries no gradient, is counted over the step in a pass of its own before the first
backward pass; with f fixed, the loss is a sum over tokens, and micro-batches add up to it exactly.

Source: Fedus et al. 2021, Switch Transformer, equations 4 to 6, arXiv:2101.03961, summed over layers as in
transformers' ``load_balancing_loss_func``.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UserInputError

KEY = "router_aux_loss_coef"


def check_router_loss(config: PreTrainedConfig, coefficient: float | None, key: str = f"train.{KEY}") -> None:
    """Refuse a router loss where transformers defines none.

    Raises:
        UserInputError: If the model has no routers, or balances them in another way (DeepSeek-V3, GLM-4-MoE).
    """
    if coefficient and not hasattr(config.get_text_config(), KEY):
        raise UserInputError(
            f"{key}: a model of type {config.model_type!r} has no load-balancing loss, got {coefficient:g}. Remove it."
        )


class RouterLoss:
    """The load-balancing loss of one model.

    Args:
        model: The base, with or without adapters in it.
        coefficient: What it is multiplied with.

    Attributes:
        value: The loss of the last step, coefficient included; None before the first.

    Raises:
        UserInputError: If the model has no such loss.
    """

    def __init__(self, model: PreTrainedModel, coefficient: float) -> None:
        check_router_loss(model.config, coefficient, key=KEY)
        self.coefficient = coefficient
        self.top_k: int = model.config.get_text_config().num_experts_per_tok
        self.routers = list(_routers(model))
        self.value: Tensor | None = None
        self._chosen: Tensor | None = None  # f, summed over layers: (experts,)
        self._rows = 0.0  # tokens times layers of the step
        if not self.routers:
            raise UserInputError(f"{KEY}: the routers of {type(model).__name__} cannot be found. Remove it.")

    @contextmanager
    def captured(self) -> Generator[list[Tensor], None, None]:
        """Collect the routers' logits of the forward passes inside the block, (tokens, experts) for each layer."""
        found: list[Tensor] = []

        def keep(index: int) -> Any:
            return lambda module, args, output: found.append(_logits(output, index))

        hooks = [router.register_forward_hook(keep(index)) for router, index in self.routers]
        try:
            yield found
        finally:
            # Before the backward pass: blocks that are recomputed in it must not be collected a second time.
            for hook in hooks:
                hook.remove()

    def begin(self) -> None:
        """Begin a step: nothing is counted yet."""
        self._chosen, self._rows, self.value = None, 0.0, None

    def count(self, logits: list[Tensor], mask: Tensor | None) -> None:
        """Add the choices of a micro-batch.

        Args:
            logits: From `captured`.
            mask: 1 for real tokens, (B, T); None if all are.
        """
        for layer in logits:
            real = torch.ones(len(layer), device=layer.device) if mask is None else mask.reshape(-1).float()
            chosen = layer.topk(self.top_k, dim=-1).indices  # (tokens, k)
            counts = torch.zeros(layer.shape[-1], device=layer.device)
            counts.scatter_add_(0, chosen.reshape(-1), real.repeat_interleave(self.top_k))
            self._chosen = counts if self._chosen is None else self._chosen + counts.to(self._chosen.device)
            self._rows = self._rows + real.sum()

    def gather(self, accelerator: Any) -> None:
        """Add up what all ranks have counted; every rank calls it, once a step."""
        assert self._chosen is not None, "a step has a token"
        self._chosen = accelerator.reduce(self._chosen, reduction="sum")
        self._rows = accelerator.reduce(torch.as_tensor(self._rows, device=self._chosen.device), reduction="sum")

    def of(self, logits: list[Tensor], mask: Tensor | None) -> Tensor:
        """Return the part of a micro-batch in the step's loss, coefficient included; arguments as in `count`."""
        assert self._chosen is not None, "the step is counted first"
        share = self._chosen / self._rows  # (experts,)
        total = self._chosen.new_zeros(())
        for layer in logits:
            probabilities = layer.float().softmax(dim=-1)
            if mask is not None:
                probabilities = probabilities * mask.reshape(-1, 1)
            total = total + (probabilities.sum(dim=0).to(share.device) * share).sum()
        loss = self.coefficient * len(share) * total / self._rows
        self.value = loss.detach() if self.value is None else self.value + loss.detach()
        return loss


def _routers(model: nn.Module) -> Generator[tuple[nn.Module, int], None, None]:
    """Return the modules whose outputs transformers calls router logits, and which of their outputs it is."""
    for owner in model.modules():
        recorder = getattr(owner, "_can_record_outputs", None) or {}
        # Some families declare it on the decoder, all on a subclass of PreTrainedModel; the head's model repeats it.
        if isinstance(owner, PreTrainedModel) and "router_logits" in recorder:
            kinds = recorder["router_logits"]
            for kind in kinds if isinstance(kinds, (list, tuple)) else [kinds]:
                target, index, part = getattr(kind, "target_class", kind), getattr(kind, "index", 0), kind
                name_part = getattr(part, "layer_name", None)
                for name, module in owner.named_modules():
                    if isinstance(module, target) and (name_part is None or name_part in name):
                        yield module, index
            return


def _logits(output: Any, index: int) -> Tensor:
    logits = output[index] if isinstance(output, (tuple, list)) else output
    return logits.reshape(-1, logits.shape[-1])
