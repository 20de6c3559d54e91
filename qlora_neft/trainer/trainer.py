"""`QLoRANeftTrainer`: TRL's `SFTTrainer` on a 4-bit NF4 base, with NEFTune as published.

How the model is built and what is evaluated, logged and saved is here; the optimizer step is in `.step_trainer`,
checkpoints and resuming in `.checkpointed_trainer`. Everything that can be left to upstream is: data preparation, the
fused head, the loop, the optimizer.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Iterable, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..base.census import Census, census, check_nf4_share, with_reached
from ..base.config import load_tokenizer
from ..base.lora import add_adapters, count_parameters, default_lora_config
from ..base.nf4 import keep_nf4_layout, load_nf4_base
from ..fused.attention import FlattenedAttention, FlatteningCollator
from ..fused.flattening import AttentionChoice
from ..fused.install import FastPath
from ..fused.pieces import Pieces, Switches
from ..noise.streams import preserved_rng
from ..run_folder.checkpoints import save_adapter
from ..steps import IGNORE_INDEX, LOSS_WEIGHTS
from ..steps.losses import TokenMean, mean_token_loss
from ..steps.weights import WeightedCollator, weighs_rows
from .callbacks import CheckpointSomeBlocks, CleanLossDue, SaidOnce
from .checkpointed_trainer import EvaluationGivenUp
from .config import QLoRANeftConfig
from .learning_guard import LearningGuard
from .loraplus import check_loraplus, loraplus_optimizer
from .loss_head import PLAIN, LossCheck, settle_loss_head
from .memory import Split
from .router_loss import RouterLoss
from .row_layout import attention_of
from .step_trainer import StepTrainer

logger = logging.getLogger(__name__)

COLLATED = ("input_ids", "labels", "seq_lengths", LOSS_WEIGHTS)  # columns that collators read


class QLoRANeftTrainer(StepTrainer):
    """Fine-tune a frozen NF4 base through LoRA adapters, with NEFTune noise on its input embeddings.

    Given a model id or directory, it loads the base in NF4 with double quantization and adds LoRA to all linear
    layers. ``quantization_config``, ``peft_config`` or a ready model override that, as in `SFTTrainer`.

    Args:
        model: Hub id, directory, or a model. A quantized model without adapters gets LoRA as well; one that is not
            quantized is trained in full, unless it has adapters or ``peft_config`` is given.
        args: Training arguments; default `QLoRANeftConfig`.
        data_collator: Collates the rows of one micro-batch; default TRL's.
        train_dataset: As in `SFTTrainer`.
        eval_dataset: As in `SFTTrainer`.
        processing_class: Tokenizer; default the model's own. It must have an end token.
        quantization_config: Replaces NF4 with double quantization.
        peft_config: Replaces `qlora_neft.base.lora.default_lora_config`. Other adapters of PEFT, such as prompt or
            prefix tuning, train, resume and are saved as in `SFTTrainer`.
        kwargs: Passed on to `SFTTrainer`.

    Raises:
        UserInputError: If the model cannot be loaded as an NF4 base.
        ValueError: If noise is on and the packing keeps no sequence boundaries.

    Attributes:
        census: The model counted: share in NF4, layers with LoRA, trained weights that the loss depends on.
        loss_check: Loss of one row by the model's own logits and by the fused head, and which of them is trained on.
        attention_choice: How rows are laid out and attended over.
    """

    loss_check: LossCheck
    census: Census
    attention_choice: AttentionChoice

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: QLoRANeftConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = _own_arguments(args)
        _check_packing(args)
        if args.padding_free and data_collator is not None:
            raise ValueError("padding_free: the data_collator given decides it. Leave one of them out.")
        self._revision: str | None = _model_init_kwargs(args).get("revision")  # of the base, and so of its tokenizer
        if isinstance(model, (str, Path)):
            processing_class = processing_class or _tokenizer_of(str(model), args)
            model = _load_base(str(model), args, quantization_config)
        # A ready model comes here without `load_nf4_base`, and its first evaluation would rewrite its weights.
        keep_nf4_layout(model)
        if getattr(model, "is_loaded_in_4bit", False):
            check_nf4_share(census(model), args.min_nf4_share, model.config._name_or_path)
        model = _with_adapters(model, peft_config, args.seed)
        check_loraplus(model, args.loraplus_lr_ratio)
        attention = attention_of(model, args, given_collator=data_collator is not None)
        # Taken now, since TRL's constructor rounds them to bf16; put back right after it.
        initial = _quantized_trainable(model)
        super().__init__(
            split=Split(args.micro_batch_size or args.per_device_train_batch_size, args.max_tokens_per_micro_batch),
            model=model,
            args=_step_arguments(args),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._restore_trainable(initial)
        self._use_attention(attention)
        self._use_weights(train_dataset, eval_dataset)
        if args.router_aux_loss_coef:
            self.router_loss = RouterLoss(_base_of(self.model), args.router_aux_loss_coef)
        self.loss_check = self._settle_loss_head()
        self.census = self._counted()
        # FSDP gathers a block's weights only while it runs: they cannot be kept in another dtype for a step.
        fused = args.fused_lora and not self.is_fsdp_enabled
        self.fast_path = FastPath(self.model, self.under_way, fused=fused)
        self.pieces = Pieces(self.model, self.args.device, _switches(args), args.compute_dtype)
        self._eval_loss: TokenMean | None = None  # of the evaluation under way
        self._clean_loss_due = CleanLossDue(args.clean_loss_steps)
        self.add_callback(self._clean_loss_due)
        self.add_callback(LearningGuard(self))
        if self.loss_check.head == PLAIN:
            self.add_callback(SaidOnce(self, str(self.loss_check)))
        # Who asked for what is done needs no line.
        if attention.note and not (args.padding_free and attention.padding_free):
            self.add_callback(SaidOnce(self, attention.note))
        if args.checkpointed_blocks:
            self.add_callback(CheckpointSomeBlocks(args.checkpointed_blocks))

    def _use_attention(self, choice: AttentionChoice) -> None:
        """Flatten batches if that was chosen; TRL's own switch also gives up ``max_length``."""
        self.attention_choice = choice
        self.attention = FlattenedAttention(self.model, choice.flattened)
        self.args.padding_free = choice.padding_free
        if choice.padding_free and isinstance(self.data_collator, DataCollatorForLanguageModeling):
            self.padding_free = True
            padded = self.data_collator
            self.data_collator = FlatteningCollator(padded.pad_token_id, pad_to_multiple_of=padded.pad_to_multiple_of)

    def _use_weights(self, *given: Any) -> None:
        """Lay the weights of the rows, if they have any, beside the labels of every batch."""
        weighted = any(map(weighs_rows, given))
        self.check_weights(weighted=weighted)
        if not weighted:
            return
        kept = (self.train_dataset, self.eval_dataset)
        if any(weighs_rows(rows) and not weighs_rows(own) for rows, own in zip(given, kept, strict=True)):
            raise ValueError(f"packing: upstream's drops the column {LOSS_WEIGHTS}. Set packing=False.")
        self.data_collator = WeightedCollator(self.data_collator)

    @property
    def attention_implementation(self) -> str:
        """Attention of the training passes: ours, or the name of transformers'."""
        chosen = self.attention_choice.implementation
        return str(self.model.config._attn_implementation) if chosen == "auto" else chosen

    def _restore_trainable(self, initial: dict[str, Tensor]) -> None:
        """Undo TRL's cast of a quantized model's adapters to bf16: fp32 values from before it, not rounded ones.

        The cast breaks fp16's gradient scaler and crawls on CPUs (huggingface/trl#4901, #7268). Can go when
        `SFTTrainer` leaves the adapters' dtype alone.
        """
        for name, param in self.model.named_parameters():
            if name in initial:
                param.data = initial[name].to(param.device, torch.float32)

    def _counted(self) -> Census:
        """Count the model; see `qlora_neft.base.census`."""
        found = census(self.model)
        if isinstance(self.model, PeftModel):
            with preserved_rng(), self.accelerator.autocast():
                found = with_reached(found, self.model)
        logger.info(found.line())
        return found

    def _settle_loss_head(self) -> LossCheck:
        """Make sure that the training loss is the model's own, see `.loss_head`."""
        row = next(iter(self.train_dataset), {})
        ids = row.get("input_ids") or ()
        weight = cast("nn.Embedding", self.model.get_input_embeddings()).weight
        with preserved_rng():
            return settle_loss_head(
                self.model,
                # Rows that are tokenized only when they are collated (images) are stood in for.
                ids if len(ids) > 1 else range(1, 9),
                device=weight.device,
                dtype=min(self.args.compute_dtype, weight.dtype, key=lambda dtype: torch.finfo(dtype).bits),
                autocast=self.accelerator.autocast(),
            )

    def fast_path_record(self) -> dict[str, Any]:
        """Return which pieces of the fast path were on, and for what they were not, as ``summary.json`` has it."""
        attention = {
            "padding_free": self.attention_choice.padding_free,
            "attn_implementation": self.attention_implementation,
        }
        return {**self.fast_path.record(), **attention, **self.pieces.record()}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create upstream's optimizer, with LoRA+'s groups if B has a rate of its own."""
        ratio = self.args.loraplus_lr_ratio
        if self.optimizer is None and ratio is not None and ratio > 1:  # at 1 all rates are one
            trained = cast(Any, self.model if model is None else model)
            found = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, trained)
            decay = self.args.weight_decay
            self.optimizer = loraplus_optimizer(trained, *found, ratio=ratio, weight_decay=decay)
        return super().create_optimizer(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as upstream does, on the fast path where there is one."""
        self.fast_path.install()  # again: adapters may have been added since
        with self.pieces.in_use(self.accelerator.autocast) as lines:
            for line in (self.fast_path.line(), self.fast_path.dropout_line(), *lines):
                if line:
                    self.say(line)
            return super().train(*args, **kwargs)

    # ---- Evaluation: it depends on the model and the rows alone, and changes nothing else ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as upstream does, without noise; random streams stay where they were."""
        with preserved_rng():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Run upstream's loop; its loss is averaged over tokens, so that the evaluation batch size cannot change it.

        Upstream averages batch means, weighted by rows.
        """
        self._eval_loss = TokenMean()
        try:
            output = super().evaluation_loop(*args, **kwargs)
            name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
            if output.metrics is not None and name in output.metrics:
                output.metrics[name] = self._eval_loss.value(self.accelerator)
        finally:
            self._eval_loss = None
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch as upstream does, and count its loss by its trained tokens."""
        self.check_stop()
        labels = inputs.get("labels")  # (B, T)
        with self.attention.over(inputs) as moved:
            found = super().prediction_step(model, moved, *args, **kwargs)
        loss = found[0]
        if self._eval_loss is not None and labels is not None and loss is not None:
            total = labels[..., 1:].ne(IGNORE_INDEX)  # the first label of a row is never predicted
            total = total if LOSS_WEIGHTS not in inputs else inputs[LOSS_WEIGHTS][..., 1:] * total
            self._eval_loss.add(loss, total.sum().to(loss.device))
        return found

    def held_out_loss(self) -> float | None:
        """Return the mean loss per trained token on the evaluation set, without noise and without a log entry."""
        return self._mean_loss(self.eval_dataset)

    def clean_train_loss(self) -> float | None:
        """Return the mean loss per trained token on the first rows of the training set: no noise, no dropout.

        Training losses are measured under noise; the paper's effect (its Figure 4) shows only here. None for rows
        that are not tokenized before they are collated.
        """
        num_rows = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else self.args.clean_loss_rows
        return self._mean_loss(self.train_dataset.take(min(self.args.clean_loss_rows, num_rows)))

    def _mean_loss(self, rows: Iterable[dict[str, Any]]) -> float | None:
        features = [{key: row[key] for key in COLLATED if key in row} for row in rows]
        if not features or "input_ids" not in features[0]:
            return None
        size, device = self.args.per_device_eval_batch_size, self.args.device
        # Autocast as in training, so that the two losses differ by noise and dropout, not by number format.
        with preserved_rng(), self.accelerator.autocast():
            return mean_token_loss(self.model, features, self.data_collator, size, device, self._over_unless_stopped)

    @contextmanager
    def _over_unless_stopped(self, inputs: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Wrap one pass of a measurement as `attention.over` does, unless the run was asked to stop."""
        self.check_stop()
        with self.attention.over(inputs) as moved:
            yield moved

    # ---- Logging and saving ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the noise's norms and, every ``clean_loss_steps``, the clean train loss."""
        # Only training steps log a plain `loss`; evaluations and the final summary have prefixed names.
        if "loss" in logs:
            logs.update(self._noise_log())
            if self.router_loss is not None and self.router_loss.value is not None:
                logs["router_loss"] = self.router_loss.value.item()
            if self._clean_loss_due(self.state.global_step):
                self._log_clean_loss(logs)
        super().log(logs, start_time)

    def _log_clean_loss(self, logs: dict[str, float]) -> None:
        try:
            loss = self.clean_train_loss()
        except EvaluationGivenUp:
            # What else is logged of the step stands, and the step is saved.
            self.control.should_training_stop = self.control.should_save = True
            self.control.should_evaluate = False
        else:
            if loss is not None:
                logs["clean_loss"] = loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write what was trained and the tokenizer, and no ``training_args.bin``: its pickle holds the Hub token."""
        if self.args.should_save:
            # A processor, which upstream allows as well, is saved in the same way.
            tokenizer = cast("PreTrainedTokenizerBase | None", self.processing_class)
            model, folder = self.accelerator.unwrap_model(self.model), output_dir or self._output_dir
            save_adapter(model, tokenizer, folder, revision=self._revision)


# ---- Arguments, base and adapters ----


def _own_arguments(args: TrainingArguments | None) -> QLoRANeftConfig:
    """Copy the caller's arguments, or take the defaults; refuse a plain `SFTConfig`, which has decided on bf16."""
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


def _step_arguments(args: QLoRANeftConfig) -> QLoRANeftConfig:
    """Return a copy in which one dataloader batch is one optimizer step, which the trainer splits itself."""
    step = copy.copy(args)
    # Upstream's loop then steps the optimizer after every batch, and counts steps, epochs and logs by it.
    step.per_device_train_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    step.gradient_accumulation_steps = 1
    step.use_liger_kernel = False  # ours is another switch, see `Pieces`; upstream's also replaces the loss
    step.padding_free = False  # done here: TRL's collator is replaced, its refusals and warnings do not apply
    # Off in TRL, which would take the model's own coefficient for a None, compute the loss over a micro-batch, and set
    # the configuration so that the model computes it in evaluation and generation too, where a cache breaks it.
    step.router_aux_loss_coef = 0.0
    if step.n_gpu > 1:
        step._n_gpu = 1  # as transformers does: the base is on one device, and other visible GPUs are left alone
    return step


def _switches(args: QLoRANeftConfig) -> Switches:
    return Switches(
        triton=args.use_triton_kernels,
        liger=args.use_liger_kernel,
        norms=args.fused_norms,
        rotary=args.fused_rotary,
        compiled=args.compile_blocks,
    )


def _check_packing(args: QLoRANeftConfig) -> None:
    """Refuse noise on packed rows that carry no boundaries."""
    if args.packing and args.packing_strategy == "wrapped" and args.noise_is_on:
        raise ValueError(
            "packing_strategy: 'wrapped' keeps no sequence boundaries, so that NEFTune's L is unknown. Use 'bfd', or "
            "neftune_noise_alpha=None."
        )


def _tokenizer_of(name_or_path: str, args: QLoRANeftConfig) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer, with the caller's end token if there is one."""
    revision = _model_init_kwargs(args).get("revision", "main")
    own = {} if args.eos_token is None else {"eos_token": args.eos_token}
    return load_tokenizer(name_or_path, revision=revision, trust_remote_code=args.trust_remote_code, **own)


def _load_base(
    name_or_path: str, args: QLoRANeftConfig, quantization_config: BitsAndBytesConfig | None
) -> PreTrainedModel:
    """Load the frozen base on this rank's device, with the caller's ``model_init_kwargs``."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **_model_init_kwargs(args)}
    args.model_init_kwargs = None  # spent here: upstream would warn that a ready model ignores them
    return load_nf4_base(
        name_or_path,
        device=args.device,
        compute_dtype=args.compute_dtype,
        quantization_config=quantization_config,
        **kwargs,
    )


def _model_init_kwargs(args: QLoRANeftConfig) -> dict[str, Any]:
    # Typed as text too, for upstream's command line; SFTConfig.__post_init__ has parsed it.
    assert not isinstance(args.model_init_kwargs, str)
    return args.model_init_kwargs or {}


def _with_adapters(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, seed: int
) -> PreTrainedModel | PeftModel:
    """Add LoRA, its initialization drawn from the seed alone."""
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError("peft_config: the model already has adapters. Pass one or the other.")
        return model
    if peft_config is None and not getattr(model, "is_loaded_in_4bit", False):
        return model  # a ready, unquantized model trains in full, as in SFTTrainer
    # LoRA's A is drawn from the global stream: seeded here, whatever drew from it before.
    set_seed(seed)
    return add_adapters(model, peft_config or default_lora_config(count_parameters(model)))


def _base_of(model: nn.Module) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def _quantized_trainable(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """Copy a quantized model's trainable weights, which TRL is about to round; other models have none to save."""
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return {}
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}
