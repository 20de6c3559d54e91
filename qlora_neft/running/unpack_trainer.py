"""What a recipe states about model and training, handed to the trainer as flat arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from ..data import PreparedData
from ..errors import UserInputError
from ..lora import lora_config
from ..precision import PrecisionPolicy
from ..quantization import load_nf4_base, nf4_config
from ..recipe import Recipe
from ..trainer import QLoRANeftConfig, QLoRANeftTrainer
from .plan import RunPlan
from .processes import num_processes, uses_fsdp
from .unpack import model_path


def trainer_of(
    trainer_class: type[QLoRANeftTrainer],
    recipe: Recipe,
    policy: PrecisionPolicy,
    plan: RunPlan,
    tokenizer: Any,
    data: PreparedData,
    output_dir: Path,
) -> QLoRANeftTrainer:
    """The trainer, its NF4 base loaded and its adapters added."""
    quantization, lora = recipe.quantization, recipe.lora
    model = load_nf4_base(
        model_path(recipe),
        device=policy.device,
        compute_dtype=policy.compute_dtype,
        quantization_config=nf4_config(
            policy.compute_dtype,
            double_quant=quantization.bnb_4bit_use_double_quant,
            quant_storage=_quant_storage(recipe, policy),
        ),
        revision=recipe.model.revision,
    )
    trainer = trainer_class(
        model,
        _arguments(recipe, policy, plan, has_eval=data.eval is not None, output_dir=output_dir),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        peft_config=lora_config(lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(
    recipe: Recipe, policy: PrecisionPolicy, plan: RunPlan, *, has_eval: bool, output_dir: Path
) -> QLoRANeftConfig:
    train, neftune, machine = recipe.train, recipe.neftune, recipe.machine
    noise = {} if neftune is None else {f"neftune_{key}": value for key, value in neftune.model_dump().items()}
    # The step is the recipe's; how it is split is the plan's. The trainer multiplies these two back together.
    return QLoRANeftConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=-(-train.effective_batch_size // num_processes()),
        effective_batch_size=train.effective_batch_size,
        micro_batch_size=plan.per_device_train_batch_size,
        max_tokens_per_micro_batch=plan.max_tokens_per_micro_batch,
        per_device_eval_batch_size=plan.per_device_eval_batch_size,
        gradient_checkpointing=plan.activation_checkpointing,
        checkpointed_blocks=plan.checkpointed_blocks,
        padding_free=plan.padding_free,
        max_steps=plan.num_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        optim=plan.optim,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        logging_steps=plan.logging_steps,
        logging_first_step=True,
        clean_loss_steps=plan.clean_loss_steps,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=plan.eval_steps,
        dataloader_num_workers=recipe.machine.dataloader_num_workers,
        dataloader_pin_memory=policy.device.type == "cuda",
        bf16=policy.amp == "bf16",
        fp16=policy.amp == "fp16",
        use_cpu=policy.device.type == "cpu",
        max_length=None,  # rows are cut already, and counted
        save_strategy="steps" if machine.save_steps not in ("auto", 0) else "no",
        save_steps=machine.save_steps if machine.save_steps not in ("auto", 0) else 500,
        save_total_limit=machine.save_total_limit,
        max_bad_steps=train.max_bad_steps,
        report_to="none",
        disable_tqdm=True,
        **noise,
    )


def _quant_storage(recipe: Recipe, policy: PrecisionPolicy) -> torch.dtype:
    """What the NF4 bytes are declared as.

    Raises:
        UserInputError: If FSDP is asked for and would not shard them.
    """
    wanted = recipe.machine.bnb_4bit_quant_storage
    storage = torch.uint8 if wanted == "auto" else getattr(torch, wanted)
    if uses_fsdp() and storage != policy.compute_dtype:
        raise UserInputError(
            "machine.bnb_4bit_quant_storage: must be the compute dtype under FSDP, which shards no other "
            f"({str(policy.compute_dtype).removeprefix('torch.')}), got {wanted}."
        )
    return storage
