"""The loss of a micro-batch and what is logged of it, without waiting for the device before the step is over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..steps.weights import of_predictions


def token_loss(outputs: Any, num_items: Tensor | int | None, loss_type: str, weights: Tensor | None = None) -> Tensor:
    """Return the loss of a micro-batch, divided by the trained tokens of its whole step.

    The same as in `trl.SFTTrainer.compute_loss`, but for weights.

    Args:
        outputs: Of TRL's fused head: ``log_probs`` (B, T - 1), 0 where nothing is trained, and ``label_mask``.
        num_items: Trained tokens of the whole step, or their total weight; None for those of the micro-batch.
        loss_type: ``"nll"``, or ``"dft"`` (arXiv:2508.05629): each token's loss times its probability.
        weights: How much each token of the batch counts, (B, T); None for 1.
    """
    losses = -outputs.log_probs
    if loss_type == "dft":
        losses = losses * outputs.log_probs.exp().detach()
    if weights is not None:
        counted = of_predictions(weights, outputs.label_mask)
        total = counted.sum() if num_items is None else torch.as_tensor(num_items, device=losses.device)
        return (losses * counted).sum() / total.masked_fill(total == 0, 1)  # a total may well be below 1
    count = outputs.label_mask.sum() if num_items is None else torch.as_tensor(num_items)
    return losses.sum() / count.clamp(min=1)  # a micro-batch without a label is 0, not NaN


@dataclass
class StepMetrics:
    """What TRL logs of every micro-batch: entropy, token accuracy, router loss.

    TRL reads them in every micro-batch, and the device idles while the host waits for them. Here they stay on the
    device until the step's loss, which has to be read anyway.
    """

    names: tuple[str, ...] = ()
    values: list[Tensor] = field(default_factory=list)  # (len(names),) each, float32

    def clear(self) -> None:
        """Forget what was added since the last reading."""
        self.values = []

    def add(self, outputs: Any) -> None:
        """Add the means over a micro-batch's trained tokens; 0 if it has none."""
        count = outputs.label_mask.sum()
        found = {
            "entropy": torch.where(count > 0, outputs.entropy.detach().sum() / count, 0),
            "mean_token_accuracy": torch.where(count > 0, outputs.is_top1.sum() / count, 0),
        }
        if outputs.aux_loss is not None:
            found["aux_loss"] = outputs.aux_loss.detach().mean()
        self.names = tuple(found)
        self.values.append(torch.stack([value.float() for value in found.values()]))

    def read(self, loss: Tensor) -> tuple[float, list[dict[str, float]]]:
        """Return the loss of the step and the metrics of its micro-batches, all with one wait for the device."""
        first, *rest = torch.cat([loss.detach().float().reshape(1), *self.values]).tolist()
        width = len(self.names)
        rows = [rest[i * width : (i + 1) * width] for i in range(len(self.values))]
        self.clear()
        return first, [dict(zip(self.names, row, strict=True)) for row in rows]
