"""Losses of tokenized rows: the negative log-likelihood of their trained tokens, without noise or dropout.

The model runs with TRL's fused head (``fused_lm_head=True``, see ``trl.trainer.utils.add_fused_lm_head``), so that the
logits, (B, T, V), are never built. `QLoRANeftTrainer` puts that head on its model, or the model's own where the two
differ (`qlora_neft.trainer.loss_head`); add it to any other model first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import IGNORE_INDEX, LOSS_WEIGHTS
from .weights import of_predictions

if TYPE_CHECKING:
    from accelerate import Accelerator

Rows = Sequence[Mapping[str, Any]]
# A block that a model's pass over a batch runs in; it yields the model's inputs.
PassOver = Callable[[Mapping[str, Any]], AbstractContextManager[Mapping[str, Any]]]


@dataclass(frozen=True)
class RowLosses:
    """Losses of rows, in the order of the rows.

    Attributes:
        sums: Negative log-likelihood of each row's trained tokens, (N,), nats, float64 on the CPU.
        counts: Trained tokens of each row, (N,), int64 on the CPU; float64 if tokens have weights, which these add up.
    """

    sums: Tensor
    counts: Tensor

    def mean(self) -> float:
        """Return nats per trained token over all rows; NaN if no token is trained."""
        return (self.sums.sum() / self.counts.sum()).item()


def row_losses(model: nn.Module, rows: Rows, *, batch_size: int, device: torch.device) -> RowLosses:
    """Compute the loss of each row. The batch size changes the result by rounding only.

    Args:
        model: With TRL's fused head. Left in the mode it was in.
        rows: ``input_ids`` and ``labels``, and ``loss_weights`` if all have them.
        batch_size: Rows per forward pass; rows of similar length share one.
        device: Device of the model.
    """
    # float64: float32 would lose digits over long rows, and sums are compared between runs.
    sums = torch.zeros(len(rows), dtype=torch.float64)
    weighted = any(LOSS_WEIGHTS in row for row in rows)
    counts = torch.zeros(len(rows), dtype=torch.float64 if weighted else torch.int64)
    # Like lengths together waste the least padding; results go back to the rows' own places.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            losses, trained = _token_losses(model, pad_right([rows[i] for i in batch]), device)
            sums[batch] = losses.double().sum(dim=1).cpu()
            counts[batch] = trained.sum(dim=1).cpu().to(counts.dtype)
    return RowLosses(sums, counts)


def mean_token_loss(
    model: nn.Module,
    rows: Rows,
    collator: Callable[[list], dict[str, Any]],
    batch_size: int,
    device: torch.device,
    over: PassOver = nullcontext,
) -> float:
    """Return the mean negative log-likelihood of the rows' trained tokens, in nats; NaN if no token is trained.

    Unlike `row_losses` it takes the caller's collator, which may flatten rows into one, so it works by the batch.

    Args:
        model: With TRL's fused head. Left in the mode it was in.
        rows: What ``collator`` takes.
        collator: Makes a batch with ``labels``.
        batch_size: Rows per forward pass, in the order given.
        device: Device of the model.
        over: Wraps each pass, for a model that attends over flattened batches in another way.
    """
    mean = TokenMean()
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            with over(collator(list(rows[start : start + batch_size]))) as inputs:
                losses, trained = _token_losses(model, inputs, device)
            total = trained.sum()
            # A batch without a trained token counts as 0, not as NaN, and has no weight.
            mean.add(losses.sum() / total.masked_fill(total == 0, 1), total)
    return mean.value()


@dataclass
class TokenMean:
    """A mean over tokens, built from batch means. It stays on the device until `value` is asked for."""

    total: Tensor | float = 0.0
    count: Tensor | float = 0.0

    def add(self, batch_mean: Tensor, num_tokens: Tensor) -> None:
        """Count a batch's mean loss once per trained token; both are scalars."""
        self.total = self.total + batch_mean.detach().double() * num_tokens
        self.count = self.count + num_tokens

    def value(self, accelerator: Accelerator | None = None) -> float:
        """Return the mean over all batches, and over all ranks if an accelerator is given; NaN without tokens."""
        pair = torch.stack([torch.as_tensor(self.total).double(), torch.as_tensor(self.count).double()])
        if accelerator is not None and accelerator.num_processes > 1:
            # Sums are exchanged, not means: ranks may hold different numbers of tokens.
            pair = accelerator.reduce(pair, reduction="sum")
        return (pair[0] / pair[1]).item()


def pad_right(rows: Rows, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Collate rows into ``input_ids``, ``labels`` and ``attention_mask``, (B, T) each, T the longest row.

    The pad token is masked, so which one it is does not matter to a causal model.
    """
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[Any], fill: int) -> list[Any]:
        # On the right: it moves no position, and under a causal mask no real token sees it.
        return [*values, *[fill] * (width - len(values))]

    weighted = LOSS_WEIGHTS in rows[0]
    weights = {LOSS_WEIGHTS: torch.tensor([padded(row[LOSS_WEIGHTS], 0) for row in rows])} if weighted else {}
    return {
        **weights,
        "input_ids": torch.tensor([padded(row["input_ids"], pad_token_id) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], IGNORE_INDEX) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def _token_losses(model: nn.Module, inputs: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return each predicted token's loss times its weight, and the weight, (B, T - 1) each; 1 or 0 without weights."""
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    weights = moved.pop(LOSS_WEIGHTS, None)
    # log_probs and label_mask, (B, T - 1): shifted by one, since the token before it predicts each label.
    outputs = model(**moved, use_cache=False, fused_lm_head=True)
    if weights is None:
        return -outputs.log_probs, outputs.label_mask
    weights = of_predictions(weights, outputs.label_mask)
    return -outputs.log_probs * weights, weights


@contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Switch dropout and gradients off inside the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
