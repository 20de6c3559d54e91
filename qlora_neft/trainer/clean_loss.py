"""Mean loss per trained token, without noise or dropout, independent of how rows are batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..steps.batch import IGNORE_INDEX


@dataclass
class TokenMean:
    """A mean over tokens, built from batch means; on device, one synchronization at the end."""

    total: Tensor | float = 0.0
    count: Tensor | float = 0.0

    def add(self, batch_mean: Tensor, labels: Tensor) -> None:
        """Count a batch's mean loss by its trained tokens; ``labels`` is (B, T)."""
        tokens = labels[..., 1:].ne(IGNORE_INDEX).sum()
        self.total = self.total + batch_mean.detach().double() * tokens
        self.count = self.count + tokens

    def mean(self, accelerator: Any = None) -> float:
        """The mean over all batches, and over all ranks where an accelerator is given; NaN without tokens."""
        pair = torch.stack([torch.as_tensor(self.total).double(), torch.as_tensor(self.count).double()])
        if accelerator is not None and accelerator.num_processes > 1:
            pair = accelerator.reduce(pair, reduction="sum")
        return (pair[0] / pair[1]).item()


def mean_token_loss(
    model: nn.Module, features: Sequence[dict], collator: Callable, batch_size: int, device: torch.device
) -> float:
    """Mean negative log-likelihood of the trained tokens of some rows, in nats.

    Uses TRL's fused head (``fused_lm_head=True``), so that full logits are never built. The model is left in the
    mode it was in.
    """
    was_training, mean = model.training, TokenMean()
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(features), batch_size):
                inputs = _to_device(collator(list(features[start : start + batch_size])), device)
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
                mean.add(-outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1), inputs["labels"])
    finally:
        model.train(was_training)
    return mean.mean()


def _to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
