"""The section ``machine``: how a run is carried out, which changes nothing of what is learned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from .section import Auto, Count, CountOrZero, NotNegative, Positive, Section, Text, broken_rule

Tracker = Literal["trackio", "wandb", "tensorboard", "mlflow"]  # as transformers names them; each is an extra


class Machine(Section):
    """How the run is carried out: nothing here changes what is learned. With auto, the machine decides."""

    # Where, and in which arithmetic.
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the model")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="precision of the arithmetic")
    bnb_4bit_quant_storage: Literal["auto", "uint8", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype that holds the NF4 bytes; FSDP needs the compute dtype; auto: uint8"
    )
    # How a step is divided, and what memory it takes.
    per_device_train_batch_size: Auto | Count = Field(
        "auto", description="maximum number of sequences in a forward pass; a step is split into such micro-batches"
    )
    max_tokens_per_micro_batch: Auto | Count = Field(
        "auto", description="maximum number of tokens in a forward pass, padding included; one sequence may exceed it"
    )
    per_device_eval_batch_size: Auto | Count = Field("auto", description="sequences per evaluation pass")
    activation_checkpointing: Auto | bool | CountOrZero = Field(
        "auto", description="recompute activations: true, false, or the number of blocks that do"
    )
    padding_free: Auto | bool = Field(
        "auto", description="concatenate sequences instead of padding them; auto: on a GPU, where the model allows it"
    )
    attn_implementation: Literal[
        "auto",
        "sdpa",
        "eager",
        "varlen",
        "per_sequence",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
    ] = Field(
        "auto", description="attention: varlen and per_sequence over concatenated sequences; others as in transformers"
    )
    # The fast path of a step.
    fused_lora: Auto | bool = Field(
        "auto", description="compute LoRA layers and MLPs in fused functions: fewer passes over memory; auto: true"
    )
    fused_norms: Auto | bool = Field("auto", description="compute RMSNorm in fewer passes over memory; auto: true")
    fused_rotary: Auto | bool = Field(
        "auto", description="compute rotary position embeddings in fewer passes over memory; auto: true"
    )
    use_triton_kernels: Auto | bool = Field(
        "auto", description="Triton kernels for the fused functions; auto: with CUDA, each where its check passes"
    )
    use_liger_kernel: Auto | bool = Field(
        "auto", description="Liger's kernels for what is not fused; auto: with CUDA, where liger-kernel is installed"
    )
    activation_offloading: Auto | bool = Field(
        "auto", description="keep what the backward pass needs in host memory; needs CUDA; auto: false"
    )
    torch_compile: bool = Field(False, description="compile the blocks of the model")
    # How data is read and prepared.
    dataloader_num_workers: CountOrZero = Field(
        0, description="processes that prepare batches; 0: none beside the main one"
    )
    dataset_num_proc: Auto | Count = Field(
        "auto", description="processes that tokenize; the result does not depend on it"
    )
    streaming: bool = Field(False, description="read Hub data row by row instead of downloading it first")
    # When checkpoints are written, and where they go.
    save_steps: Auto | CountOrZero = Field(
        "auto", description="optimizer steps between checkpoints; auto, 0: no checkpoints by steps"
    )
    save_every_minutes: NotNegative = Field(
        10.0, description="minutes between checkpoints; 0: no checkpoints by the clock"
    )
    save_total_limit: Count = Field(2, description="number of checkpoints to keep")
    grace_seconds: Positive = Field(30.0, description="seconds from a stop signal to the written checkpoint")
    mirror_dir: Text | None = Field(
        None, description="second folder for checkpoints and results, such as a mounted Drive"
    )
    push_to: Text | None = Field(None, description="Hub repository (owner/name) whose branch checkpoints receives them")
    push_every: Count = Field(1, description="push every so many checkpoints")
    threads: Auto | Count = Field("auto", description="number of CPU threads")
    # What is measured, and how often.
    logging_steps: Auto | Count = Field("auto", description="optimizer steps between log lines")
    eval_steps: Auto | Count = Field("auto", description="optimizer steps between evaluations")
    eval_answers: Auto | CountOrZero = Field(
        "auto", description="held-out prompts to answer before and after training; auto: 3; scored if 20 or more"
    )
    clean_loss_steps: Auto | CountOrZero = Field(
        "auto", description="optimizer steps between measurements of the train loss without noise and dropout; 0: never"
    )
    report_to: Tracker | list[Tracker] = Field(
        [], description="trackers that receive what is logged, beside metrics.jsonl; each is an extra to install"
    )

    @field_validator("report_to")
    @classmethod
    def _each_tracker_once(cls, value: Tracker | list[Tracker]) -> Tracker | list[Tracker]:
        if isinstance(value, list) and len(set(value)) < len(value):
            raise broken_rule(f"names a tracker twice, got {', '.join(value)}. Name each once.")
        return value

    @field_validator("push_every")
    @classmethod
    def _only_with_a_repository(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and "push_to" in info.data and info.data["push_to"] is None:
            raise broken_rule(
                f"has no effect without push_to, got {value}. Remove it, or write push_to: owner/name.",
                involves=("push_to",),
            )
        return value

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """The trackers of ``report_to``, in its order."""
        return (self.report_to,) if isinstance(self.report_to, str) else tuple(self.report_to)
