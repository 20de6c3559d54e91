"""QLoRANeftTrainer: TRL's `SFTTrainer` on a 4-bit NF4 base, with NEFTune as published.

One dataloader batch is one optimizer step; `training_step` splits it into micro-batches. Everything that can
be left to upstream is: data preparation, the fused head, the loop, the optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainerCallback, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from ..base.config import load_tokenizer
from ..base.lora import add_adapters, count_parameters, default_lora_config
from ..base.nf4 import keep_nf4_layout, load_nf4_base
from ..noise.freelb import Perturbation
from ..noise.neftune import NEFTuneNoise, NoiseStatistics, alpha_at, expected_norm, lookup_scale, noisy_embeddings
from ..noise.streams import keyed_rng, stream_key
from ..run_folder.checkpoints import save_adapter
from ..steps.batch import MicroBatch
from ..steps.sequences import find_sequences
from .config import QLoRANeftConfig
from .step_trainer import Split, StepTrainer


def own_arguments(args: Any) -> QLoRANeftConfig:
    """A copy of the caller's arguments, or the defaults; refuses a plain `SFTConfig`, which has decided on bf16."""
    if args is None:
        return QLoRANeftConfig()
    if not isinstance(args, QLoRANeftConfig):
        raise TypeError(
            f"args: must be a QLoRANeftConfig, got {type(args).__name__}. It takes every argument of SFTConfig, and "
            "decides bf16 or fp16 by what the device can do."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size: would change the optimizer step. Set per_device_train_batch_size lower."
        )
    return copy.copy(args)  # the caller's object stays as it is


def step_arguments(args: QLoRANeftConfig) -> QLoRANeftConfig:
    """A copy in which one dataloader batch is one optimizer step; the trainer splits it itself."""
    step = copy.copy(args)
    step.per_device_train_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    step.gradient_accumulation_steps = 1
    if step.n_gpu > 1:
        step._n_gpu = 1  # as transformers does: the base is on one device, and other visible GPUs are left alone
    return step


def check_packing(args: QLoRANeftConfig) -> None:
    """Refuse noise on packed rows that carry no boundaries."""
    if args.packing and args.packing_strategy == "wrapped" and args.noise_is_on:
        raise ValueError(
            "packing_strategy: 'wrapped' keeps no sequence boundaries, so that NEFTune's L is unknown. Use 'bfd', or "
            "neftune_noise_alpha=None."
        )


def load_base(name_or_path: str, args: QLoRANeftConfig, quantization_config: Any) -> PreTrainedModel:
    """The frozen base, on this rank's device, with the caller's ``model_init_kwargs``."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    args.model_init_kwargs = None  # spent here: upstream would warn that a ready model ignores them
    return load_nf4_base(
        name_or_path,
        device=args.device,  # of this rank
        compute_dtype=args.compute_dtype,
        quantization_config=quantization_config,
        **kwargs,
    )


def tokenizer_of(name_or_path: str, args: QLoRANeftConfig) -> Any:
    """The model's own tokenizer, with the caller's end token if one was given."""
    revision = (args.model_init_kwargs or {}).get("revision", "main")
    own = {} if args.eos_token is None else {"eos_token": args.eos_token}
    return load_tokenizer(name_or_path, revision=revision, trust_remote_code=args.trust_remote_code, **own)


def quantized_trainable(model: Any) -> dict[str, Tensor]:
    """Copies of a quantized model's trainable weights, which TRL is about to round; empty for other models."""
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return {}
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def with_adapters(model: Any, peft_config: LoraConfig | None, seed: int) -> Any:
    """Add LoRA, its initialization drawn from the seed alone."""
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError("peft_config: the model already has adapters. Pass one or the other.")
        return model
    if peft_config is None and not getattr(model, "is_loaded_in_4bit", False):
        return model  # a ready, unquantized model trains in full, as in SFTTrainer
    set_seed(seed)
    return add_adapters(model, peft_config or default_lora_config(count_parameters(model)))


class CheckpointSomeBlocks(TrainerCallback):
    """Keep activation checkpointing on for the first ``num_blocks`` decoder blocks only.

    Args:
        num_blocks: Blocks that recompute their activations in the backward pass, at least 1.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Upstream has just switched it on for every block."""
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for block in blocks[self.num_blocks :]:
            block.gradient_checkpointing = False


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
        peft_config: Replaces `qlora_neft.base.lora.default_lora_config`.
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
