"""How much each token counts in the loss of its step, where that is not 1 for all that are trained.

Weights come with the rows (`LOSS_WEIGHTS`), and are laid beside the labels of a batch wherever its collator puts its
sequences. The loss of a step is the weighted sum over its tokens, divided by the total weight of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UserInputError
from . import IGNORE_INDEX, LOSS_WEIGHTS
from .sequences import SequenceSpan, find_sequences

TOKENS, SEQUENCES = "tokens", "sequences"  # what a step's loss is the mean of


@dataclass(frozen=True)
class WeightedCollator:
    """Collates rows with weights.

    Attributes:
        collator: Collates the same rows without their weights, in their order; it may pad on any side, or flatten.
    """

    collator: Callable[[list], dict[str, Any]]

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the collator's batch, with ``loss_weights`` of the shape of ``input_ids``, float32.

        Raises:
            UserInputError: If the batch has other tokens than the rows, so that the weights fit none.
        """
        weights = [w for row in rows for w in row.get(LOSS_WEIGHTS) or [1.0] * len(row["input_ids"])]
        inputs = self.collator([{key: value for key, value in row.items() if key != LOSS_WEIGHTS} for row in rows])
        placed, flat = torch.zeros(inputs["input_ids"].shape), torch.tensor(weights)
        spans = find_sequences(inputs, num_tokens=len(weights))
        if sum(span.length for span in spans) != len(weights):
            raise UserInputError(
                f"{LOSS_WEIGHTS}: {len(weights)} weights, and the data_collator's batch has "
                f"{sum(span.length for span in spans)} tokens. Let it keep every token of its rows."
            )
        for span, part in zip(spans, flat.split([span.length for span in spans]), strict=True):
            placed[span.row, span.tokens] = part
        return {**inputs, LOSS_WEIGHTS: placed}


def weighs_rows(dataset: Any) -> bool:
    """Tell whether a dataset has weights for its tokens."""
    return LOSS_WEIGHTS in (getattr(dataset, "column_names", None) or ())


def total_weight(inputs: Mapping[str, Any]) -> float:
    """Return the weight of a batch's trained tokens; without weights their number."""
    trained = inputs["labels"][..., 1:].ne(IGNORE_INDEX)  # nothing predicts the first token of a row
    if LOSS_WEIGHTS not in inputs:
        return int(trained.sum())
    # Summed in float64: how a step is split moves its total by nothing that float32 would notice.
    return float((inputs[LOSS_WEIGHTS][..., 1:] * trained).double().sum())


def per_sequence(inputs: Mapping[str, Any], spans: Sequence[SequenceSpan]) -> tuple[Tensor, int]:
    """Return weights by which every sequence counts the same, however many of its tokens are trained.

    Args:
        inputs: A batch, with weights or without; no sequence's first token has a label, or it is in the first column.
        spans: Its sequences.

    Returns:
        Weights that add up to 1 in each sequence, like ``labels``; and how many sequences train anything.
    """
    trained = inputs["labels"].ne(IGNORE_INDEX)
    weights = (inputs[LOSS_WEIGHTS] * trained).clone() if LOSS_WEIGHTS in inputs else trained.float()
    weights[..., 0] = 0
    count = 0
    for span in spans:
        total = weights[span.row, span.tokens].sum()
        if total > 0:
            weights[span.row, span.tokens] = weights[span.row, span.tokens] / total
            count += 1
    return weights, count


def of_predictions(weights: Tensor, label_mask: Tensor) -> Tensor:
    """Return the weights of predicted tokens, 0 where nothing is trained.

    Args:
        weights: Of a batch's tokens, (B, T).
        label_mask: Which predictions are trained, (B, T - 1), or more of them on the left for tokens that prompt tuning
            puts before the batch's.
    """
    shifted = weights[..., 1:]
    return pad(shifted, (label_mask.shape[-1] - shifted.shape[-1], 0)) * label_mask
