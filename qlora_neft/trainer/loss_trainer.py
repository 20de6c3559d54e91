"""The loss of a micro-batch as TRL computes it, with its metrics left on the device until the step is over."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from ..steps import LOSS_WEIGHTS
from ..steps.batch import MicroBatch
from ..steps.weights import TOKENS
from .selecting_trainer import SelectingTrainer
from .step_metrics import StepMetrics
from .step_metrics import token_loss as loss_of


class LossTrainer(SelectingTrainer):
    """A trainer that does not wait for the device in a micro-batch.

    Args:
        kwargs: As in `SelectingTrainer`.

    Attributes:
        step_metrics: Of the micro-batches since the last step's loss was read.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.step_metrics = StepMetrics()

    def token_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Tensor | int | None
    ) -> Any:
        """Compute the loss of tokens as TRL does; the metrics are this rank's own, and stay on the device."""
        weights = inputs.get(LOSS_WEIGHTS)
        if weights is not None:
            inputs = {key: value for key, value in inputs.items() if key != LOSS_WEIGHTS}
        if not model.training or return_outputs or self._loss_is_custom():
            with _ungathered(self.accelerator) if model.training and self.args.world_size > 1 else nullcontext():
                if weights is None:
                    return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                with _outputs(model) as fused:
                    found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = loss_of(fused[0], num_items_in_batch, self.args.loss_type, weights)
            return (loss, found[1]) if return_outputs else loss
        outputs = model(**{**inputs, "use_cache": False, "fused_lm_head": True})
        self.step_metrics.add(outputs)
        loss = loss_of(outputs, num_items_in_batch, self.args.loss_type, weights)
        # The tokens are those of all ranks, and the ranks' gradients are averaged.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._signature_columns and LOSS_WEIGHTS not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, LOSS_WEIGHTS]

    def check_weights(self, *, weighted: bool) -> None:
        """Refuse weights, or a mean over sequences, beside a loss that knows nothing of them.

        Raises:
            ValueError: If the loss is the caller's own, or smooths labels.
        """
        if (weighted or self.args.loss_mean != TOKENS) and self._loss_is_custom():
            what = LOSS_WEIGHTS if weighted else f"loss_mean={self.args.loss_mean!r}"
            raise ValueError(
                f"{what}: cannot be combined with compute_loss_func, label_smoothing_factor or sequence parallelism, "
                "which compute the loss without it. Leave one of them out."
            )

    def _loss_is_custom(self) -> bool:
        """Whether the loss needs the logits, or upstream's sequence parallelism."""
        parallelism = self.accelerator.parallelism_config
        smooths = self.label_smoother is not None and self.args.loss_type == "nll"
        return self.compute_loss_func is not None or smooths or getattr(parallelism, "sp_enabled", False)

    def count_tokens(self, micro: MicroBatch) -> None:
        """Count a pass's tokens as TRL does, padding left out where a mask tells; on the CPU, before it moves."""
        if self._loss_is_custom():
            return  # TRL has counted
        mask = micro.inputs.get("attention_mask")
        self._total_train_tokens += int(mask.sum()) if mask is not None else micro.inputs["input_ids"].shape[1]
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def read_metrics(self, loss: Tensor) -> float:
        """Hand the metrics of a step's micro-batches to TRL's log, and return its loss: one wait for the device."""
        value, rows = self.step_metrics.read(loss)
        for row in rows:
            for name, metric in row.items():
                self._metrics["train"][name].append(metric)
        return value

    def _prepare_input(self, data: Any) -> Any:
        """Move a tensor as upstream does, without waiting for it."""
        if isinstance(data, Tensor) and data.device.type == "cpu" and not self.is_deepspeed_enabled:
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)


@contextmanager
def _outputs(model: nn.Module) -> Generator[list[Any], None, None]:
    """Collect what a model returns inside the block: the fused head's outputs first, then those with logits."""
    found: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _ungathered(accelerator: Accelerator) -> Generator[None, None, None]:
    """Let this one object's ``gather_for_metrics`` return what it is given, inside the block.

    Can go when TRL's `SFTTrainer.compute_loss` gathers its metrics once a step.
    """

    def returned(input_data: Any, use_gather_object: bool = False) -> Any:
        return input_data

    accelerator.gather_for_metrics = returned  # shadows the class's own
    try:
        yield
    finally:
        del accelerator.gather_for_metrics
