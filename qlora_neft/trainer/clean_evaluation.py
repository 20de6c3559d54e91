"""Evaluation without noise: losses per trained token, and no random stream moved."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from ..steps.randomness import preserved_rng
from .clean_loss import TokenMean, mean_token_loss

_COLUMNS = ("input_ids", "labels", "seq_lengths")


class CleanEvaluationTrainer(SFTTrainer):
    """`SFTTrainer` whose evaluations depend on the model and the rows alone, and change nothing else."""

    _eval_loss: TokenMean | None = None  # of the evaluation that is running

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as upstream does, without noise; random streams stay where they were."""
        with preserved_rng():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Upstream's loop, its loss averaged over tokens, so that the evaluation batch size cannot change it."""
        self._eval_loss = TokenMean()
        try:
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            if f"{prefix}_loss" in output.metrics:
                output.metrics[f"{prefix}_loss"] = self._eval_loss.mean(self.accelerator)
        finally:
            self._eval_loss = None
        return output

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As upstream; an evaluation also counts each batch's loss by its tokens."""
        labels = inputs.get("labels")
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._eval_loss is not None and labels is not None:
            self._eval_loss.add(result[0] if return_outputs else result, labels)
        return result

    def held_out_loss(self) -> float | None:
        """Mean loss per trained token on the evaluation set, without noise and without a log entry."""
        return self._mean_loss(self.eval_dataset)

    def clean_train_loss(self) -> float | None:
        """Mean loss per trained token on the first rows of the training set: no noise, no dropout.

        Training losses are measured under noise; the paper's effect (its Figure 4) shows only here. None for rows
        that are not tokenized before they are collated.
        """
        return self._mean_loss(self.train_dataset.take(min(self.args.clean_loss_rows, _num_rows(self.train_dataset))))

    def _mean_loss(self, rows: Iterable[dict[str, Any]]) -> float | None:
        features = [{key: row[key] for key in _COLUMNS if key in row} for row in rows]
        if not features or "input_ids" not in features[0]:
            return None
        size, device = self.args.per_device_eval_batch_size, self.args.device
        with preserved_rng(), self.accelerator.autocast():
            return mean_token_loss(self.model, features, self.data_collator, size, device)


def _num_rows(rows: Any) -> float:
    return len(rows) if isinstance(rows, Sized) else float("inf")
