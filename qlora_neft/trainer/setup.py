"""What `QLoRANeftTrainer` prepares before TRL's constructor runs: arguments, base, tokenizer, adapters."""

from __future__ import annotations

import copy
from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from ..lora import add_adapters, count_parameters, default_lora_config
from ..quantization import load_nf4_base
from ..tokenizer import load_tokenizer
from .config import QLoRANeftConfig


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
