"""QLoRANeftTrainer: TRL's `SFTTrainer` on a 4-bit NF4 base, with NEFTune as published.

One dataloader batch is one optimizer step; `training_step` splits it into micro-batches. Everything that can
be left to upstream is: data preparation, the fused head, the loop, the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, PreTrainedModel

from .adapter import save_adapter
from .checkpointing import CheckpointSomeBlocks
from .clean_evaluation import CleanEvaluationTrainer
from .label_check import check_labels
from .neftune import NEFTuneNoise, NoiseStatistics, alpha_at, expected_norm, lookup_scale, noisy_embeddings
from .quantization import keep_nf4_layout
from .randomness import keyed_rng, preserved_rng, stream_key
from .sequences import find_sequences
from .step_batch import MicroBatch, StepBatch, StepCollator
from .trainer_config import QLoRANeftConfig
from .trainer_setup import (
    check_packing,
    load_base,
    own_arguments,
    quantized_trainable,
    step_arguments,
    tokenizer_of,
    with_adapters,
)

__all__ = ["QLoRANeftConfig", "QLoRANeftTrainer"]


class QLoRANeftTrainer(CleanEvaluationTrainer):
    """Fine-tune a frozen NF4 base through LoRA adapters, with NEFTune noise on its input embeddings.

    Given a model id or directory it loads the base in NF4 with double quantization and adds LoRA on all linear
    layers. ``quantization_config``, ``peft_config`` or a ready model override that, as in `SFTTrainer`.

    Args:
        model: Hub id, directory, or a model. A quantized model without adapters gets LoRA as well.
        args: Training arguments; default `QLoRANeftConfig`.
        data_collator: Collates the rows of one micro-batch; default TRL's.
        train_dataset: As in `SFTTrainer`.
        eval_dataset: As in `SFTTrainer`.
        processing_class: Tokenizer; default the model's own. It must have an end token.
        quantization_config: Replaces NF4 with double quantization.
        peft_config: Replaces `qlora_neft.lora.default_lora_config`.
        kwargs: Passed on to `SFTTrainer`.

    Raises:
        UserInputError: If the model cannot be loaded as an NF4 base.
        ValueError: If noise is on and the packing keeps no sequence boundaries.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: QLoRANeftConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = own_arguments(args)
        check_packing(args)
        if isinstance(model, (str, Path)):
            processing_class = processing_class or tokenizer_of(str(model), args)
            model = load_base(str(model), args, quantization_config)
        keep_nf4_layout(model)
        self.micro_batch_size = args.micro_batch_size or args.per_device_train_batch_size
        self.tokens_seen = self.trained_tokens_seen = 0  # real tokens, and those with a label, on this rank
        model = with_adapters(model, peft_config, args.seed)
        initial = quantized_trainable(model)
        super().__init__(
            model=model,
            args=step_arguments(args),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._restore_trainable(initial)
        self.neftune_noise_alpha = None  # upstream's own hook stays off: it scales by the padded width
        self.loss_is_scaled_for_ga = True  # every micro-batch is divided by the tokens of the whole step
        self._lookup_scale = lookup_scale(self._embedding())
        self._noise_statistics = NoiseStatistics()
        self._next_clean_loss = 0
        if args.checkpointed_blocks:
            self.add_callback(CheckpointSomeBlocks(args.checkpointed_blocks))

    def _restore_trainable(self, initial: dict[str, Tensor]) -> None:
        """Undo TRL's cast of a quantized model's adapters to bf16: fp32 values from before it, not rounded ones.

        The cast breaks fp16's gradient scaler and crawls on CPUs (huggingface/trl#4901, #7268). It can go when
        `SFTTrainer` leaves the adapters' dtype alone.
        """
        for name, param in self.model.named_parameters():
            if name in initial:
                param.data = initial[name].to(param.device, torch.float32)

    def _embedding(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model).get_input_embeddings()

    # ---- The training step ----

    def get_train_dataloader(self) -> DataLoader:
        """A dataloader whose batches are whole optimizer steps, as `StepBatch`."""
        plain = self.data_collator
        self.data_collator = StepCollator(
            plain, self.micro_batch_size, self.args.max_tokens_per_micro_batch, self.padding_free
        )
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward through the micro-batches of one optimizer step; returns the step's loss."""
        step = inputs if isinstance(inputs, StepBatch) else StepBatch.of(inputs)
        if self.tokens_seen == 0:
            check_labels(step, self.processing_class)
        offset = self._first_ordinal(step)
        if self.aux_loss_enabled:
            self.current_gradient_accumulation_steps = len(step)  # upstream averages a router loss over these
        self.tokens_seen += step.num_tokens()
        self.trained_tokens_seen += step.num_trained_tokens()
        loss = torch.zeros((), device=self.args.device)
        for index, micro in enumerate(step):
            with self._gradient_sync(model, last=index == len(step) - 1), self._randomness(micro, offset, index):
                loss = loss + super().training_step(model, dict(micro.inputs), num_items_in_batch)
        return loss

    def _gradient_sync(self, model: torch.nn.Module, *, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.accelerator.no_sync(model)

    @contextmanager
    def _randomness(self, micro: MicroBatch, offset: int, index: int) -> Iterator[None]:
        """All that is random in a micro-batch, keyed by seed and step: its noise and its dropout."""
        dropout = stream_key("dropout", self.args.seed, self.state.global_step, self.args.process_index, index)
        with noisy_embeddings(self._embedding(), self._noise(micro, offset)), keyed_rng(dropout, self.args.device):
            yield

    def _noise(self, micro: MicroBatch, offset: int) -> NEFTuneNoise | None:
        alpha = self._alpha(self.state.global_step)
        if alpha == 0:
            return None
        spans = find_sequences(micro.inputs) if micro.spans is None else micro.spans
        return NEFTuneNoise(
            spans=[span.shifted(offset) for span in spans],
            alpha=alpha,
            seed=self.args.seed,
            step=self.state.global_step,
            distribution=self.args.neftune_distribution,
            scale=self._lookup_scale,
            statistics=self._noise_statistics if self._next_step_is_logged() else None,
        )

    def _alpha(self, step: int) -> float:
        args, num_steps = self.args, self.state.max_steps
        alpha, final_alpha = args.neftune_noise_alpha or 0.0, args.neftune_final_alpha
        return alpha_at(step, num_steps, alpha, final_alpha, args.neftune_schedule)

    def _first_ordinal(self, step: StepBatch) -> int:
        """Sequences of this step on lower ranks: ordinals count through the step as one process would."""
        if self.args.world_size == 1 or not self.args.noise_is_on:
            return 0
        count = torch.tensor([step.num_sequences()], device=self.args.device)
        return int(self.accelerator.gather(count)[: self.args.process_index].sum())

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Trained tokens of the whole step, over all micro-batches and ranks: what every loss is divided by."""
        if not all(isinstance(batch, StepBatch) for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.tensor(sum(step.num_trained_tokens() for step in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as upstream does; global random streams are the same before and after."""
        self._next_clean_loss = 0  # a second call counts its steps from the beginning
        with preserved_rng():
            return super().train(*args, **kwargs)

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the noise's norms and, every ``clean_loss_steps``, the clean train loss."""
        if "loss" in logs:
            logs.update(self._noise_log())
            logs.update(self._clean_loss_log())
        super().log(logs, start_time)

    def _noise_log(self) -> dict[str, float]:
        means, self._noise_statistics = self._noise_statistics.means(), NoiseStatistics()
        if means is None:
            return {}
        alpha = self._alpha(self.state.global_step - 1)  # of the step just taken
        return {
            "neftune_alpha": alpha,
            "neftune_expected_norm": expected_norm(alpha, self.args.neftune_distribution),
            "neftune_norm": means[0],
            "neftune_noise_to_embedding": means[1],
        }

    def _clean_loss_log(self) -> dict[str, float]:
        every = self.args.clean_loss_steps
        if not every or self.state.global_step < self._next_clean_loss:
            return {}
        self._next_clean_loss = (self.state.global_step // every + 1) * every
        loss = self.clean_train_loss()
        return {} if loss is None else {"clean_loss": loss}

    def _next_step_is_logged(self) -> bool:
        every = max(int(self.state.logging_steps or 1), 1)
        return (self.state.global_step + 1) % every == 0 or self.state.global_step == 0

    # ---- Upstream bookkeeping that reads a batch ----

    def floating_point_ops(self, inputs: Any) -> int:
        """Sum over the micro-batches of a step."""
        if isinstance(inputs, StepBatch):
            return sum(super(QLoRANeftTrainer, self).floating_point_ops(micro.inputs) for micro in inputs)
        return super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        for batch in (micro.inputs for micro in inputs) if isinstance(inputs, StepBatch) else [inputs]:
            super()._track_num_input_tokens(batch)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the adapter and the tokenizer, and no ``training_args.bin``: its pickle holds the Hub token."""
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_adapter(self.model, self.processing_class, output_dir or self.args.output_dir)
