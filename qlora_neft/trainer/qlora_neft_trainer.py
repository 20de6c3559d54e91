"""QLoRANeftTrainer: TRL's `SFTTrainer` on a 4-bit NF4 base, with NEFTune as published.

One dataloader batch is one optimizer step; `training_step` splits it into micro-batches. Everything that can
be left to upstream is: data preparation, the fused head, the loop, the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..neftune import NEFTuneNoise, NoiseStatistics, alpha_at, expected_norm, lookup_scale, noisy_embeddings
from ..quantization import keep_nf4_layout
from ..run_folder.adapter import save_adapter
from ..steps.batch import MicroBatch
from ..steps.freelb import Perturbation
from ..steps.randomness import keyed_rng, stream_key
from ..steps.sequences import find_sequences
from .activation_checkpointing import CheckpointSomeBlocks
from .config import QLoRANeftConfig
from .setup import (
    check_packing,
    load_base,
    own_arguments,
    quantized_trainable,
    step_arguments,
    tokenizer_of,
    with_adapters,
)
from .smaller_steps import Split
from .step_trainer import StepTrainer

__all__ = ["QLoRANeftConfig", "QLoRANeftTrainer"]


class QLoRANeftTrainer(StepTrainer):
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
        self.split = Split(args.micro_batch_size or args.per_device_train_batch_size, args.max_tokens_per_micro_batch)
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
        self._perturbation: Perturbation | None = None
        self._adversarial_norms: list[Tensor] = []
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

    # ---- Noise and dropout ----

    def passes(self) -> int:
        """FreeLB's, in steps that have noise; one without."""
        return self.args.neftune_adversarial_steps if self._alpha(self.state.global_step) else 1

    @contextmanager
    def randomness(self, micro: MicroBatch, offset: int, index: int, number: int) -> Iterator[None]:
        """All that is random in a pass, keyed by seed and step: its noise, and its dropout, the same in every pass."""
        dropout = stream_key("dropout", self.args.seed, self.state.global_step, self.args.process_index, index)
        noise = self._noise(micro, offset) if self.passes() == 1 else self._climbed(micro, offset, number)
        with noisy_embeddings(self._embedding(), noise), keyed_rng(dropout, self.args.device):
            yield

    def _climbed(self, micro: MicroBatch, offset: int, number: int) -> Perturbation | None:
        if number == 0:
            noise = self._noise(micro, offset)
            self._perturbation = noise and Perturbation(noise, self.args.neftune_adversarial_step_size)
        elif self._perturbation is not None:
            self._perturbation.ascend()
            if number == self.passes() - 1 and self._next_step_is_logged():
                self._adversarial_norms += self._perturbation.norms()
        return self._perturbation

    def _noise(self, micro: MicroBatch, offset: int) -> NEFTuneNoise | None:
        alpha = self._alpha(self.state.global_step)
        if alpha == 0 or micro.spans == []:  # a row that only keeps this rank in step
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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `StepTrainer` does."""
        self._next_clean_loss = 0  # a second call counts its steps from the beginning
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
        norms, self._adversarial_norms = self._adversarial_norms, []
        if means is None:
            return {}
        alpha = self._alpha(self.state.global_step - 1)  # of the step just taken
        return {
            "neftune_alpha": alpha,
            "neftune_expected_norm": expected_norm(alpha, self.args.neftune_distribution),
            "neftune_norm": means[0],
            "neftune_noise_to_embedding": means[1],
            **({"neftune_adversarial_norm": torch.stack(norms).mean().item()} if norms else {}),
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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the adapter and the tokenizer, and no ``training_args.bin``: its pickle holds the Hub token."""
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_adapter(self.model, self.processing_class, output_dir or self.args.output_dir)
