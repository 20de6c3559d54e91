"""The sections ``neftune`` and ``train``: the noise, and the optimization."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from .section import Count, NotNegative, Positive, Section, broken_rule

SELECTION_STEPS = 0.1  # ten evaluations in a run
SELECTION_THRESHOLD = 0.001  # nats per token: far above what rounding moves, far below what anyone would notice


class Neftune(Section):
    """Noise on the input embeddings during training. Omit the section for none."""

    noise_alpha: NotNegative = Field(description="noise strength, dimensionless; 0: no noise")
    distribution: Literal["uniform", "gaussian", "bernoulli"] = Field(
        "uniform", description="distribution of each component before scaling"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="how alpha changes over the run")
    final_alpha: NotNegative | None = Field(
        None, description="alpha at the last step, required unless the schedule is constant"
    )
    adversarial_steps: Count = Field(1, description="passes per step; above 1, the noise climbs the loss (FreeLB)")
    adversarial_step_size: Positive | None = Field(
        None, description="step size of FreeLB's ascent, a norm on the scale of noise_alpha"
    )
    symmetric: bool = Field(False, description="two passes per step, with the noise and its mirror image (SymNoise)")

    @field_validator("final_alpha")
    @classmethod
    def _only_with_a_schedule(cls, value: float | None, info: ValidationInfo) -> float | None:
        schedule = info.data.get("schedule")
        if schedule == "constant" and value is not None:
            raise broken_rule(
                f"has no effect under schedule: constant, got {value:g}. "
                "Remove it, or write schedule: linear or cosine.",
                involves=("schedule",),
            )
        if schedule in ("linear", "cosine") and value is None:
            raise broken_rule(
                f"required under schedule: {schedule}. Write the alpha of the last step, for instance 0.",
                involves=("schedule",),
            )
        return value

    @field_validator("adversarial_step_size")
    @classmethod
    def _only_for_freelb(cls, value: float | None, info: ValidationInfo) -> float | None:
        steps = info.data.get("adversarial_steps", 1)
        if steps == 1 and value is not None:
            raise broken_rule(
                f"has no effect under adversarial_steps: 1, got {value:g}. Remove it, or write more steps for FreeLB.",
                involves=("adversarial_steps",),
            )
        if steps > 1 and value is None:
            raise broken_rule(
                f"required under adversarial_steps: {steps}. Write the norm of one ascent step, for instance half of "
                "noise_alpha.",
                involves=("adversarial_steps",),
            )
        return value

    @field_validator("symmetric")
    @classmethod
    def _not_with_freelb(cls, value: bool, info: ValidationInfo) -> bool:
        steps = info.data.get("adversarial_steps", 1)
        if value and steps > 1:
            raise broken_rule(
                f"cannot be combined with adversarial_steps: {steps}, which is FreeLB's, got true. Keep one.",
                involves=("adversarial_steps",),
            )
        return value


class Train(Section):
    """The optimization."""

    # How long.
    effective_batch_size: Count = Field(description="sequences per optimizer step, on any hardware")
    num_train_epochs: Positive = Field(description="passes over the examples")
    max_steps: Count | None = Field(
        None, description="maximum number of optimizer steps; the run ends at whichever limit comes first"
    )
    # What is averaged.
    loss_mean: Literal["tokens", "sequences"] = Field(
        "tokens", description="loss of a step: mean over its trained tokens, or over the means of its sequences"
    )
    # How fast.
    learning_rate: Positive = Field(description="peak learning rate")
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        description="learning rate schedule"
    )
    warmup_steps: NotNegative = Field(0.0, description="optimizer steps of warm-up; below 1: a share of all steps")
    # By which optimizer, and with which of its constants.
    optim: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_torch"] = Field(
        description="optimizer, and how its state is stored"
    )
    weight_decay: NotNegative = Field(0.0, description="decoupled weight decay, multiplied by the learning rate")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="decay rate of the gradient's running mean"
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="decay rate of the squared gradient's running mean"
    )
    loraplus_lr_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(
        None, description="learning rate of LoRA's matrices B over that of A (LoRA+); null: one rate for both"
    )
    router_aux_loss_coef: NotNegative | None = Field(
        None, description="weight of the experts' load-balancing loss, over the whole step; null: none"
    )
    # What is done about a gradient that is too large, or not finite.
    max_grad_norm: NotNegative = Field(description="L2 norm that gradients are clipped to; 0: no clipping")
    max_bad_steps: Count = Field(
        10, description="steps in a row that may be skipped for NaN or infinity before the run fails"
    )
    # Which step's weights are the result, and whether the run ends before its last step.
    early_stopping_patience: Count | None = Field(
        None, description="end after so many evaluations in a row without improvement of the held-out loss; null: never"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="whose weights are the result: the last step's, or those of the lowest held-out loss"
    )
    selection_steps: Positive = Field(
        SELECTION_STEPS,
        description="optimizer steps between the evaluations that keep and patience go by; below 1: a share of all "
        "steps",
    )
    early_stopping_threshold: NotNegative = Field(
        SELECTION_THRESHOLD, description="nats per token by which the held-out loss must fall to count as improved"
    )
    # NumPy, which transformers seeds with the same number, takes 32 bits.
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(
        description="seed of data order, dropout, noise and LoRA initialization"
    )

    @field_validator("warmup_steps")
    @classmethod
    def _fits_the_schedule(cls, value: float, info: ValidationInfo) -> float:
        scheduler = info.data.get("lr_scheduler_type")
        if value >= 1 and value != int(value):
            raise broken_rule(f"a whole number of steps, or a share below 1, got {value:g}.")
        if scheduler == "constant" and value > 0:
            raise broken_rule(
                f"has no effect under lr_scheduler_type: constant, got {value:g}. "
                "Remove it, or write lr_scheduler_type: constant_with_warmup.",
                involves=("lr_scheduler_type",),
            )
        if scheduler == "constant_with_warmup" and value == 0:
            raise broken_rule(
                "required under lr_scheduler_type: constant_with_warmup. "
                "Write a number of steps or a share such as 0.03, or lr_scheduler_type: constant.",
                involves=("lr_scheduler_type",),
            )
        return value

    @property
    def selects(self) -> bool:
        """Whether evaluations on held-out rows decide which weights are the result."""
        return self.keep == "best" or self.early_stopping_patience is not None

    @field_validator("selection_steps", "early_stopping_threshold")
    @classmethod
    def _only_with_a_selection(cls, value: float, info: ValidationInfo) -> float:
        if info.field_name == "selection_steps" and value >= 1 and value != int(value):
            raise broken_rule(f"a whole number of steps, or a share below 1, got {value:g}.")
        default = cls.model_fields[str(info.field_name)].default
        known = {"keep", "early_stopping_patience"} <= info.data.keys()
        if known and value != default and info.data["keep"] == "last" and info.data["early_stopping_patience"] is None:
            raise broken_rule(
                f"has no effect without keep: best or early_stopping_patience, got {value:g}. Remove it, or write "
                "one of them.",
                involves=("keep", "early_stopping_patience"),
            )
        return value
