"""`QLoRANeftConfig`: the arguments of `QLoRANeftTrainer`, beyond TRL's `SFTConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from ..base.precision import resolve_precision
from ..fit.choose import CPU_TOKENS
from ..noise.neftune import DISTRIBUTIONS, SCHEDULES
from ..recipe.train import SELECTION_STEPS, SELECTION_THRESHOLD
from ..steps.weights import SEQUENCES, TOKENS
from .selection import KEEP

# Renamed by transformers between 5.15 and 5.23, which warns about the old name. Can go when 5.15 need not be supported.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {f.name for f in fields(TrainingArguments)}
)


@dataclass
class QLoRANeftConfig(SFTConfig):
    """`trl.SFTConfig`, with NEFTune as published and precision by capability.

    ``per_device_train_batch_size`` times ``gradient_accumulation_steps`` is the optimizer step, in sequences per
    device; the first is only the largest micro-batch it is split into.

    Attributes:
        neftune_noise_alpha: Noise strength, dimensionless, >= 0. None and 0 are the same run, bit for bit. The
            paper tries 5, 10 and 15.
        neftune_distribution: ``"uniform"`` (the paper), ``"gaussian"`` (its ablation) or ``"bernoulli"`` (SymNoise's).
        neftune_schedule: ``"constant"``, ``"linear"`` or ``"cosine"``, from alpha to the final alpha.
        neftune_final_alpha: Noise strength at the last step; required by a schedule that is not constant.
        neftune_adversarial_steps: Forward and backward passes per step: 1 is NEFTune, more are FreeLB's (see
            `qlora_neft.noise.freelb`), and cost that many times as much.
        neftune_symmetric: SymNoise (arXiv:2312.01523): each step passes over its rows with the noise and with its
            mirror image, and takes the mean of the two gradients. Costs twice as much; not together with FreeLB.
        neftune_adversarial_step_size: Length of FreeLB's ascent step, an L2 norm per sequence like alpha; required with
            more than one pass.
        clean_loss_steps: Optimizer steps between two measurements of the clean train loss (no noise, no dropout),
            taken at the first log after; 0 for never.
        clean_loss_rows: Rows of the training set, from the first, that it is measured on.
        micro_batch_size: Maximum rows per micro-batch; None for ``per_device_train_batch_size``. Says how a step that
            does not divide evenly is split.
        max_tokens_per_micro_batch: Maximum tokens per micro-batch, padding counted; a longer row gets one of its own.
            None decides by device: 256 on a CPU, which is as fast as more and keeps memory low; no limit with CUDA.
        checkpointed_blocks: Decoder blocks that recompute their activations, counted from the first; None for all of
            them if activation checkpointing is on.
        gradient_checkpointing: None decides by device: on with CUDA, off on a CPU, where memory is plentiful.
        effective_batch_size: Sequences per optimizer step of all ranks together, for a step that ranks do not divide
            evenly; None for ``per_device_train_batch_size`` times ``gradient_accumulation_steps`` times ranks.
        loss_mean: What a step's loss is the mean of: ``"tokens"``, its trained tokens, or ``"sequences"``, the means
            over the trained tokens of each. Evaluation is over tokens in either.
        router_aux_loss_coef: Weight of the load-balancing loss of experts; None and 0 are no such loss, where TRL takes
            the model's own weight for None. It is computed over the whole step, see `.router_loss`.
        loraplus_lr_ratio: Learning rate of LoRA's matrices B over that of A, at least 1 (LoRA+, arXiv:2402.12354); None
            and 1 are one rate for both.
        min_nf4_share: Least share of the block weights in NF4 for a base that is loaded in 4 bits; fewer are refused.
        keep: ``"best"``: end with the weights of the lowest loss on ``eval_dataset``, see `.selection`; ``"last"``:
            with those of the last step.
        early_stopping_patience: End after so many evaluations in a row without improvement; None for never.
        selection_steps: Optimizer steps between the evaluations that these two go by; below 1, a share of all steps.
            The last step is always one. ``eval_steps`` adds others, which count for nothing.
        early_stopping_threshold: Nats per token by which the loss must fall below the best to count as improved.
        max_bad_steps: The run fails after this many steps in a row whose loss or gradient is not finite, each skipped.
        padding_free: Whether the rows of a micro-batch are flattened instead of padded; None decides by device and
            model family, see `qlora_neft.fused.flattening`. Works with ``max_length`` and without packing.
        attn_implementation: ``"auto"``, ``"varlen"`` or ``"per_sequence"`` (attention over flattened rows, ours), or
            one of transformers' (``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` ...).
        fused_lora: LoRA layers and MLPs as fused functions (`qlora_neft.fused`); False for the modules' own path. Both
            learn the same.
        fused_norms: RMSNorm in few passes over memory; False for the modules' own.
        fused_rotary: Rotary embeddings in few passes over memory; False for the modules' own.
        use_triton_kernels: Triton's kernels for the fused functions; None uses them with CUDA, each where its check
            passes; True raises where they cannot run.
        use_liger_kernel: Liger's kernels for rotary embeddings, norms and MLPs that are not fused; None uses them with
            CUDA where liger-kernel is installed. Not upstream's switch of this name, which is deprecated
            and also replaces the loss.
        compile_blocks: Compile each decoder block by `torch.compile`.
        bf16, fp16: None decides by capability, see `qlora_neft.base.precision`.

    Raises:
        ValueError: If a value breaks one of these rules.
    """

    neftune_distribution: str = field(default="uniform", metadata={"help": "uniform, gaussian or bernoulli"})
    neftune_schedule: str = field(default="constant", metadata={"help": "constant, linear or cosine"})
    neftune_final_alpha: float | None = field(default=None, metadata={"help": "alpha at the last step"})
    neftune_adversarial_steps: int = field(default=1, metadata={"help": "passes per step; more than 1: FreeLB"})
    neftune_adversarial_step_size: float | None = field(default=None, metadata={"help": "L2 norm per sequence"})
    neftune_symmetric: bool = field(default=False, metadata={"help": "the noise with both signs, in two passes"})
    clean_loss_steps: int = field(default=50, metadata={"help": "steps between clean train losses; 0 = never"})
    clean_loss_rows: int = field(default=16, metadata={"help": "rows in the clean-loss slice"})
    micro_batch_size: int | None = field(default=None, metadata={"help": "rows"})
    max_tokens_per_micro_batch: int | None = field(default=None, metadata={"help": "tokens, padding counted"})
    checkpointed_blocks: int | None = field(default=None, metadata={"help": "decoder blocks; None = all"})
    effective_batch_size: int | None = field(default=None, metadata={"help": "sequences per step, of all ranks"})
    loss_mean: str = field(default="tokens", metadata={"help": "tokens or sequences"})
    loraplus_lr_ratio: float | None = field(default=None, metadata={"help": "learning rate of B over that of A"})
    min_nf4_share: float = field(default=0.9, metadata={"help": "least share of the block weights in NF4"})
    keep: str = field(default="last", metadata={"help": "last or best"})
    early_stopping_patience: int | None = field(default=None, metadata={"help": "evaluations; None = never"})
    selection_steps: float = field(default=SELECTION_STEPS, metadata={"help": "steps, or a share of them"})
    early_stopping_threshold: float = field(default=SELECTION_THRESHOLD, metadata={"help": "nats per token"})
    max_bad_steps: int = field(default=10, metadata={"help": "steps in a row that are not finite"})
    attn_implementation: str = field(default="auto", metadata={"help": "attention; auto decides"})
    fused_lora: bool = field(default=True, metadata={"help": "LoRA in fused functions"})
    fused_norms: bool = field(default=True, metadata={"help": "RMSNorm in few passes"})
    fused_rotary: bool = field(default=True, metadata={"help": "rotary embeddings in few passes"})
    use_triton_kernels: bool | None = field(default=None, metadata={"help": "None: where they run"})
    compile_blocks: bool = field(default=False, metadata={"help": "torch.compile for each block"})
    use_liger_kernel: bool | None = field(  # ty: ignore[incompatible-attribute-override]
        default=None, metadata={"help": "None: with CUDA, where it is installed"}
    )
    # Wider than upstream's bool until __post_init__, or for `padding_free` the trainer, has decided.
    gradient_checkpointing: bool | None = field(  # ty: ignore[incompatible-attribute-override]
        default=None, metadata={"help": "None decides by device"}
    )
    padding_free: bool | None = field(  # ty: ignore[incompatible-attribute-override]
        default=None, metadata={"help": "None decides by device and model"}
    )

    def __post_init__(self) -> None:
        """Check the values, then fill in what the machine decides."""
        # Before upstream's own, which sets bf16 wherever it was left open, whatever the device can do.
        self._check_noise()
        self._check_counts()
        self._set_precision()
        self._set_by_device()
        if self.liger_kernel_config:
            raise ValueError(
                f"liger_kernel_config: has no effect, got {self.liger_kernel_config}. Which of Liger's pieces are used "
                "follows from fused_lora, fused_norms and fused_rotary; remove it."
            )
        if self.activation_offloading and resolve_precision("auto", self._device()).device.type != "cuda":
            raise ValueError("activation_offloading: needs a CUDA device to offload from, got True. Leave it False.")
        super().__post_init__()

    @property
    def noise_is_on(self) -> bool:
        """Whether any step of the run adds noise."""
        return bool(self.neftune_noise_alpha) or bool(self.neftune_final_alpha)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype that the base is dequantized to and its unquantized weights are stored in."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    def _device(self) -> str | None:
        return "cpu" if self.use_cpu else None

    def _check_noise(self) -> None:
        for name in ("neftune_noise_alpha", "neftune_final_alpha"):
            value = getattr(self, name)
            # NaN fails every comparison, so the rule is stated as what must hold.
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: must be a finite number >= 0, got {value}. Use None or 0 for no noise.")
        choices = {
            "neftune_distribution": DISTRIBUTIONS,
            "neftune_schedule": SCHEDULES,
            "loss_mean": (TOKENS, SEQUENCES),
            "keep": KEEP,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.neftune_schedule == "constant" and self.neftune_final_alpha is not None:
            raise ValueError(
                f"neftune_final_alpha: has no effect under the constant schedule, got {self.neftune_final_alpha}. "
                "Set neftune_schedule to linear or cosine, or leave it None."
            )
        if self.neftune_schedule != "constant" and self.neftune_final_alpha is None:
            raise ValueError(
                f"neftune_final_alpha: required by neftune_schedule={self.neftune_schedule!r}. Give the alpha of the "
                "last step, for example 0."
            )
        size = self.neftune_adversarial_step_size
        if (self.neftune_adversarial_steps > 1) != (size is not None) or (size is not None and not 0 < size < math.inf):
            raise ValueError(
                "neftune_adversarial_step_size: must be a finite number > 0 with neftune_adversarial_steps above 1 "
                f"(FreeLB), and None without, got {size} with {self.neftune_adversarial_steps}."
            )
        if self.neftune_symmetric and self.neftune_adversarial_steps > 1:
            raise ValueError(
                "neftune_symmetric: cannot be combined with neftune_adversarial_steps above 1 (FreeLB), got True with "
                f"{self.neftune_adversarial_steps}. Keep one of the two."
            )

    def _check_counts(self) -> None:
        ratio = self.loraplus_lr_ratio
        if ratio is not None and not 1 <= ratio < math.inf:
            raise ValueError(f"loraplus_lr_ratio: must be a finite number >= 1, got {ratio}. Use None for one rate.")
        rules = {
            "neftune_adversarial_steps": 1,
            "clean_loss_steps": 0,
            "clean_loss_rows": 1,
            "micro_batch_size": 1,
            "max_tokens_per_micro_batch": 1,
            "checkpointed_blocks": 0,
            "max_bad_steps": 1,
            "early_stopping_patience": 1,
            "early_stopping_threshold": 0,
            "effective_batch_size": 1,
        }
        for name, least in rules.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value}.")
        steps = self.selection_steps
        if not 0 < steps < math.inf or (steps >= 1 and steps != int(steps)):
            raise ValueError(f"selection_steps: must be a number of steps, or a share of them below 1, got {steps}.")
        if self.keep == "best" and self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end: keep='best' does the same, by the steps of selection_steps. Leave one out."
            )

    def _set_precision(self) -> None:
        """Choose bf16 or fp16 by capability if the caller left both open; upstream's default is bf16 everywhere."""
        if self.bf16 or self.fp16:
            resolve_precision("bf16" if self.bf16 else "fp16", self._device())  # raises where it would crawl or crash
        # An explicit bf16=False, with fp16 off as well, is a wish for float32 and stays.
        elif self.bf16 is None:
            policy = resolve_precision("auto", self._device())
            self.bf16, self.fp16 = policy.amp == "bf16", policy.amp == "fp16"

    def _set_by_device(self) -> None:
        """Fill in what the caller left open; pinned memory and activation checkpointing are of use on GPUs only."""
        on_gpu = resolve_precision("auto", self._device()).device.type == "cuda"
        self.dataloader_pin_memory = self.dataloader_pin_memory and on_gpu
        if self.max_tokens_per_micro_batch is None and not on_gpu:
            self.max_tokens_per_micro_batch = CPU_TOKENS
        # The caller may have used upstream's old name or its new one. Only the new one is passed on: the old one warns.
        asked = [self.gradient_checkpointing, getattr(self, CHECKPOINTING)]
        chosen = next((value for value in asked if value is not None), None)
        # Upstream knows all or nothing; `CheckpointSomeBlocks` switches it off again for the other blocks.
        if self.checkpointed_blocks is not None:
            chosen = self.checkpointed_blocks > 0
        elif chosen is None:
            chosen = on_gpu
        # Where CHECKPOINTING is this very field, the next line fills it in.
        self.gradient_checkpointing = None
        setattr(self, CHECKPOINTING, chosen)
