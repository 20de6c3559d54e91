"""The trainer of a run: its base loaded, its adapters added, its arguments from recipe and plan."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback

from ..adapter.continued import adapter_of
from ..adapter.load import with_adapter
from ..base.lora import lora_config
from ..base.nf4 import load_nf4_base, load_unquantized_base, nf4_config
from ..errors import UserInputError
from ..trainer import QLoRANeftConfig, QLoRANeftTrainer
from .build import Run, model_path
from .plan import num_processes, uses_fsdp


def trainer_of(
    run: Run, trainer_class: type[QLoRANeftTrainer] = QLoRANeftTrainer, *, model: PreTrainedModel | None = None
) -> QLoRANeftTrainer:
    """Load the base and return the run's trainer.

    Args:
        run: Everything decided before.
        trainer_class: A subclass to train with, for experiments.
        model: A base that is loaded already; else the recipe's is.

    Raises:
        UserInputError: If the base cannot be loaded, or the machine section does not fit FSDP.
    """
    recipe, base = run.recipe, model or _base(run)
    earlier = adapter_of(recipe)
    begins = earlier is None and not recipe.trains_all  # an adapter that was there before has its own settings
    trainer = trainer_class(
        base if earlier is None else with_adapter(base, earlier, is_trainable=True),
        arguments_of(run),
        train_dataset=run.data.train,
        eval_dataset=run.data.eval,
        processing_class=run.tokenizer,
        peft_config=lora_config(recipe.adapter) if begins else None,
    )
    trainer.remove_callback(PrinterCallback)  # our own lines say the same, readably
    return trainer


def _base(run: Run) -> PreTrainedModel:
    recipe, policy, path = run.recipe, run.policy, model_path(run.recipe)
    if recipe.quantization is None:
        # Weights that are trained are in float32, as LoRA's are: in 16 bits small updates would be rounded away.
        dtype = policy.lora_dtype if recipe.trains_all else policy.compute_dtype
        return load_unquantized_base(path, device=policy.device, dtype=dtype, revision=recipe.model.revision)
    dtype = policy.compute_dtype
    return load_nf4_base(
        path,
        device=policy.device,
        compute_dtype=dtype,
        # The packed bytes are the same under every storage dtype; see quant_storage_of for who needs another.
        quantization_config=nf4_config(recipe.quantization, dtype, quant_storage=quant_storage_of(run)),
        revision=recipe.model.revision,
    )


def arguments_of(run: Run) -> QLoRANeftConfig:
    """Return the trainer's arguments, from recipe and plan."""
    recipe, plan, policy = run.recipe, run.plan, run.policy
    train, machine = recipe.train, recipe.machine
    # Without a section upstream's defaults stand, which add no noise.
    noise: dict[str, Any] = {} if recipe.neftune is None else recipe.neftune.model_dump()
    save_steps = 0 if machine.save_steps == "auto" else machine.save_steps
    return QLoRANeftConfig(
        output_dir=str(run.output_dir),
        # What a step is, the recipe says; how it is split, the plan. Rounded up: processes share a step.
        per_device_train_batch_size=-(-train.effective_batch_size // num_processes()),
        effective_batch_size=train.effective_batch_size,
        micro_batch_size=plan.per_device_train_batch_size,
        max_tokens_per_micro_batch=plan.max_tokens_per_micro_batch,
        per_device_eval_batch_size=plan.per_device_eval_batch_size,
        # transformers 5.23 calls it activation_checkpointing; the config carries it over.
        gradient_checkpointing=plan.activation_checkpointing,
        checkpointed_blocks=plan.checkpointed_blocks,
        padding_free=plan.padding_free,
        attn_implementation=plan.attn_implementation,
        fused_lora=plan.fused_lora,
        fused_norms=plan.fused_norms,
        fused_rotary=plan.fused_rotary,
        use_triton_kernels=plan.use_triton_kernels,
        use_liger_kernel=plan.use_liger_kernel,
        activation_offloading=plan.activation_offloading,
        compile_blocks=plan.torch_compile,
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
        eval_strategy="no" if run.data.eval is None else "steps",
        eval_steps=plan.eval_steps,
        dataloader_num_workers=machine.dataloader_num_workers,
        # Pinning needs a CUDA context and only speeds up copies to a GPU.
        dataloader_pin_memory=policy.device.type == "cuda",
        bf16=policy.amp == "bf16",
        fp16=policy.amp == "fp16",
        use_cpu=policy.device.type == "cpu",
        max_length=None,  # `prepare_data` has cut the rows, and counted them
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,  # upstream's default; it refuses 0
        save_total_limit=machine.save_total_limit,
        loss_mean=train.loss_mean,
        loraplus_lr_ratio=train.loraplus_lr_ratio,
        router_aux_loss_coef=train.router_aux_loss_coef,
        min_nf4_share=0.0 if recipe.quantization is None else recipe.quantization.min_nf4_share,
        keep=train.keep,
        early_stopping_patience=train.early_stopping_patience,
        selection_steps=train.selection_steps,
        early_stopping_threshold=train.early_stopping_threshold,
        max_bad_steps=train.max_bad_steps,
        report_to="none",  # never start a tracker only because it is installed
        disable_tqdm=True,  # `ProgressLines` shows progress, in a pipe too
        **{f"neftune_{key}": value for key, value in noise.items()},
    )


def quant_storage_of(run: Run) -> torch.dtype:
    """Return the dtype that the NF4 bytes are declared as.

    Raises:
        UserInputError: If FSDP is asked for and could not shard it.
    """
    asked = run.recipe.machine.bnb_4bit_quant_storage
    storage = torch.uint8 if asked == "auto" else getattr(torch, asked)
    # Under FSDP, accelerate leaves uint8 parameters unsharded: every rank would keep the whole base.
    # https://github.com/huggingface/accelerate/issues/3983
    if uses_fsdp() and storage != run.policy.compute_dtype:
        dtype = str(run.policy.compute_dtype).removeprefix("torch.")
        raise UserInputError(
            f"machine.bnb_4bit_quant_storage: must be the compute dtype under FSDP, which shards no other ({dtype}), "
            f"got {asked}."
        )
    return storage
