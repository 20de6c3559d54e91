"""The sections and keys of a recipe, with their types, defaults and rules. No torch.

The sections ``model, quantization, lora, neftune, data, train`` state what is learned. ``machine`` states how it is
run, and nothing in it may change what is learned. Types are strict: text is not accepted for a number, nor a number
for true or false. A key that would have no effect is refused, since whoever wrote it expected one.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..paths import DATA_SUFFIXES, JINJA_SUFFIXES, kind_of
from .settings import flat, learned

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Auto = Literal["auto"]
Text = Annotated[str, Field(min_length=1)]

OF_THE_ADAPTER = "auto"  # model.name_or_path, where model.adapter names a base
TEMPLATES = ("auto", "alpaca", "vicuna", "chat")


# The order of keys in a section matters: a validator sees the values of earlier keys alone (``info.data``). A key that
# is not there broke a rule of its own, which is reported already.
class Section(BaseModel):
    """A section of a recipe: strictly typed, without unknown keys, immutable."""

    # Rules apply to defaults too: a key may be required by the value of another.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, protected_namespaces=())


def broken_rule(message: str, *, involves: tuple[str, ...] = (), key: str | None = None) -> PydanticCustomError:
    """Make the error that a validator raises.

    Args:
        message: The rule, the value got, the remedy.
        involves: Other keys that the rule looks at, since an override of one of them may be the cause: ``key`` of the
            same section, ``section.key``, or ``section.`` for all of a section.
        key: The key at fault, for a validator of a whole section.
    """
    # The message is passed as a value: pydantic would read braces in a template as names.
    return PydanticCustomError("rule", "{message}", {"message": message, "involves": involves, "key": key})


def template_name(value: str) -> str:
    """Accept the name of a prompt template: one of ours, or a Jinja file, known by its suffix."""
    if value in TEMPLATES or value.endswith(JINJA_SUFFIXES):
        return value
    close = difflib.get_close_matches(value, TEMPLATES, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise broken_rule(f"one of {', '.join(TEMPLATES)}, or a .jinja file, got the text {value!r}.{meant}")


def only_on_the_hub(value: str | None, path: str, key: str) -> str | None:
    """Accept a key of data from the Hub: local files have no revision, configuration or list of files.

    Args:
        value: The key's value, None if it is not given.
        path: Where the data is.
        key: What messages call ``path``.
    """
    if value is not None and not _is_on_the_hub(path):
        raise broken_rule(
            f"has an effect only on data from the Hub, and {key} is {path!r}. Remove it.", involves=("path",)
        )
    return value


def _is_on_the_hub(path: str) -> bool:
    return kind_of(path, suffixes=DATA_SUFFIXES) == "hub"


Format = Literal["auto", "alpaca", "prompt-completion", "messages", "sharegpt", "text"]
Template = Annotated[str, AfterValidator(template_name)]
Share = Annotated[float, Field(ge=0, le=1)]


class MixedSource(Section):
    """One more source of examples, mixed with the others."""

    path: Text
    split: Text = "train"
    revision: Text | None = None
    data_files: Text | None = None
    name: Text | None = None
    format: Format = "auto"
    prompt_template: Template = "auto"
    weight: Positive = 1.0

    @field_validator("revision", "data_files", "name")
    @classmethod
    def _only_on_the_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        return only_on_the_hub(value, info.data["path"], "its path") if "path" in info.data else value


class Data(Section):
    """The examples. Local paths are relative to the current directory."""

    # Which rows.
    path: Text = Field(description="local .jsonl, .json, .csv or .parquet, a glob of them, a Hub id, or bundled:NAME")
    revision: Text | None = Field(None, description="branch, tag or commit, for path on the Hub")
    split: Text = Field("train", description="split or slice in the syntax of datasets, such as train[:128]")
    data_files: Text | None = Field(None, description="files to use of a Hub dataset, a name or a glob")
    name: Text | None = Field(None, description="configuration of a Hub dataset")
    weight: Positive = Field(
        1.0, description="how often each example is used per epoch; 0.5: half of them, chosen by hash"
    )
    mixture: list[MixedSource] = Field(
        [], description="more sources, each with keys such as path, split, format, weight"
    )
    # Which rows are held out.
    eval_path: Text | None = Field(None, description="held-out examples, named like path")
    eval_split: Text | None = Field(None, description="held-out split, of eval_path (default train) or of path")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of the rows to hold out, the same ones on every machine"
    )
    # How a row becomes a sequence.
    format: Format = Field("auto", description="how columns are read; auto: by their names")
    prompt_template: Template = Field(
        "auto", description="alpaca, vicuna, chat (the tokenizer's own), or a .jinja file; auto: by format"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(description="maximum number of tokens per sequence")
    train_on_prompt: bool = Field(False, description="compute the loss on prompts too")
    split_conversations: bool = Field(True, description="split conversations longer than max_length between turns")
    keep_end_token: bool = Field(True, description="end a response that is cut at max_length with the end token")
    # How many rows the gate lets through in spite of a fault.
    max_truncated_fraction: Share = Field(0.5, description="share of rows whose response may be cut")
    max_dropped_fraction: Share = Field(
        0.01, description="share of rows that may be dropped: empty, unusable, or too long"
    )
    max_duplicate_fraction: Share = Field(0.5, description="share of rows that may duplicate an earlier one")

    @field_validator("revision", "data_files", "name")
    @classmethod
    def _only_on_the_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        return only_on_the_hub(value, info.data["path"], "data.path") if "path" in info.data else value

    @field_validator("eval_split")
    @classmethod
    def _held_out_is_not_trained_on(cls, value: str | None, info: ValidationInfo) -> str | None:
        path, eval_path, split = (info.data.get(key) for key in ("path", "eval_path", "split"))
        named = value is not None or eval_path is not None
        if path is not None and named and (eval_path or path, value or "train") == (path, split):
            raise broken_rule(
                f"the held-out rows would be the training rows ({path}, {split}). "
                "Give another split or eval_path, or eval_fraction to hold out a share.",
                involves=("eval_path", "path", "split"),
            )
        return value

    @field_validator("eval_fraction")
    @classmethod
    def _one_source_of_held_out_rows(cls, value: float | None, info: ValidationInfo) -> float | None:
        other = [key for key in ("eval_path", "eval_split") if info.data.get(key) is not None]
        if value is not None and other:
            raise broken_rule(
                f"cannot be combined with data.{' and data.'.join(other)}, got {value:g}. Keep one.",
                involves=tuple(other),
            )
        return value

    @property
    def has_eval_rows(self) -> bool:
        """Whether the recipe names held-out examples, in any of the three ways."""
        return (self.eval_path, self.eval_split, self.eval_fraction) != (None, None, None)

    @property
    def paths(self) -> list[str]:
        """Every path that rows are read from, held-out ones included."""
        return [self.path, *(source.path for source in self.mixture), *([self.eval_path] if self.eval_path else [])]


class Model(Section):
    """The base model, whose weights are never changed."""

    name_or_path: Text = Field(description="Hub id, local folder, or bundled:NAME")
    revision: Text = Field("main", description="branch, tag or commit, for a model on the Hub")
    adapter: Text | None = Field(
        None, description="adapter to go on from, a folder or Hub id: base and LoRA settings are taken from it"
    )
    adapter_revision: Text | None = Field(None, description="branch, tag or commit, for an adapter on the Hub")

    @field_validator("adapter_revision")
    @classmethod
    def _only_with_an_adapter(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("adapter", value) is None:
            raise broken_rule(f"has no effect without model.adapter, got {value!r}. Remove it.", involves=("adapter",))
        return value

    @field_validator("revision")
    @classmethod
    def _only_on_the_hub(cls, value: str, info: ValidationInfo) -> str:
        path = info.data.get("name_or_path")
        if value != "main" and path is not None and kind_of(path) != "hub":
            raise broken_rule(
                f"has an effect only on a model from the Hub, and model.name_or_path is {path!r}, got {value!r}. "
                "Remove it.",
                involves=("name_or_path",),
            )
        return value


class Quantization(Section):
    """How the frozen base is stored."""

    bnb_4bit_quant_type: Literal["nf4"] = Field("nf4", description="4-bit data type of the weights")
    # 32/64 bits per weight become 8/64 + 32/(64 * 256): section 3 of the QLoRA paper.
    bnb_4bit_use_double_quant: bool = Field(
        True, description="quantize the scales too, which saves 0.37 bits per weight"
    )
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype that 4-bit weights are dequantized to; auto: by device"
    )

    min_nf4_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.9, description="least share of the block weights in NF4, else the base is refused"
    )

    @field_validator("bnb_4bit_quant_type", mode="before")
    @classmethod
    def _no_fp4(cls, value: Any) -> Any:
        if value == "fp4":
            raise broken_rule("the frozen base is stored as NF4, got 'fp4'. Write nf4.")
        return value


class Lora(Section):
    """The adapter: all that is trained."""

    r: Count = Field(description="rank of the update")
    # Both types, so that 16 stays a whole number in PEFT's configuration.
    lora_alpha: Count | Positive = Field(description="the update is scaled by lora_alpha / r")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(description="dropout probability on the adapter's input")
    target_modules: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)] = Field(
        description="all linear layers except the output, or a list of layer names"
    )


class Neftune(Section):
    """Noise on the input embeddings during training. Omit the section for none."""

    noise_alpha: NotNegative = Field(description="noise strength, dimensionless; 0: no noise")
    distribution: Literal["uniform", "gaussian"] = Field(
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


class Train(Section):
    """The optimization."""

    # How long.
    effective_batch_size: Count = Field(description="sequences per optimizer step, on any hardware")
    num_train_epochs: Positive = Field(description="passes over the examples")
    max_steps: Count | None = Field(
        None, description="maximum number of optimizer steps; the run ends at whichever limit comes first"
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
    router_aux_loss_coef: NotNegative | None = Field(
        None, description="weight of the experts' load-balancing loss, over the whole step; null: none"
    )
    # What is done about a gradient that is too large, or not finite.
    max_grad_norm: NotNegative = Field(description="L2 norm that gradients are clipped to; 0: no clipping")
    max_bad_steps: Count = Field(
        10, description="steps in a row that may be skipped for NaN or infinity before the run fails"
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

    @field_validator("push_every")
    @classmethod
    def _only_with_a_repository(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and "push_to" in info.data and info.data["push_to"] is None:
            raise broken_rule(
                f"has no effect without push_to, got {value}. Remove it, or write push_to: owner/name.",
                involves=("push_to",),
            )
        return value


class Recipe(Section):
    """The complete description of one run; frozen. Made by `load_recipe`."""

    model: Model
    quantization: Quantization | None  # null: the base stays in 16 bits or float32
    lora: Lora | None  # null: every weight is trained, or the settings are those of model.adapter
    neftune: Neftune | None = None
    data: Data
    train: Train
    machine: Machine = Field(default_factory=Machine)

    @model_validator(mode="before")
    @classmethod
    def _taken_from_the_adapter(cls, values: Any) -> Any:
        """Let base and LoRA settings be left out where ``model.adapter`` has them, see `adapter.continued`."""
        model = values.get("model") if isinstance(values, dict) else None
        if not isinstance(model, dict) or not model.get("adapter"):
            return values
        return {"lora": None, **values, "model": {"name_or_path": OF_THE_ADAPTER, **model}}

    @field_validator("lora")
    @classmethod
    def _something_is_trained(cls, value: Lora | None, info: ValidationInfo) -> Lora | None:
        known = "model" in info.data and "quantization" in info.data
        if value is None and known and info.data["model"].adapter is None and info.data["quantization"] is not None:
            raise broken_rule(
                "null trains every weight, which no weight in NF4 allows, and there is a quantization section. Write "
                "quantization: null too, to train the full model; or a lora section "
                f"({', '.join(Lora.model_fields)}), to train an adapter; or model.adapter, to go on from one.",
                involves=("quantization.", "model.adapter"),
            )
        return value

    @property
    def trains_all(self) -> bool:
        """Whether every weight of the model is trained, without an adapter."""
        return self.lora is None and self.model.adapter is None

    @property
    def adapter(self) -> Lora:
        """The adapter's settings, once they are known: a recipe with ``model.adapter`` may leave them to it."""
        if self.trains_all:
            raise ValueError("lora: is null, every weight is trained. Ask trains_all first.")
        if self.lora is None:
            raise ValueError("lora: is not known before the adapter is read. Use adapter.continued.resolved.")
        return self.lora

    # On ``machine``, the last section: all others are in ``info.data``.
    @field_validator("machine")
    @classmethod
    def _belongs_to_what_is_trained(cls, value: Machine, info: ValidationInfo) -> Machine:
        quantization, lora, model = (info.data.get(name, ...) for name in ("quantization", "lora", "model"))
        if quantization is None and value.bnb_4bit_quant_storage != "auto":
            raise broken_rule(
                f"has no effect on a base that is not quantized, got {value.bnb_4bit_quant_storage}. Remove it.",
                key="bnb_4bit_quant_storage",
                involves=("quantization.",),
            )
        if lora is not None or not isinstance(model, Model) or model.adapter is not None:
            return value
        if value.fused_lora is True:
            raise broken_rule("has no effect without LoRA, got true. Remove it.", key="fused_lora", involves=("lora.",))
        if value.push_to is not None:
            raise broken_rule(
                f"checkpoints of adapters alone are pushed, and lora is null, got {value.push_to!r}. Remove it.",
                key="push_to",
                involves=("lora.",),
            )
        return value

    @field_validator("machine")
    @classmethod
    def _evaluation_needs_held_out_rows(cls, value: Machine, info: ValidationInfo) -> Machine:
        data = info.data.get("data")
        for key in ("eval_steps", "per_device_eval_batch_size", "eval_answers"):
            # 0 asks for nothing, and nothing is what it gets.
            if data is not None and not data.has_eval_rows and getattr(value, key) not in ("auto", 0):
                raise broken_rule(
                    f"has no effect without held-out rows, got {getattr(value, key)}. "
                    "Remove it, or give data.eval_path, data.eval_split or data.eval_fraction.",
                    key=key,
                    involves=("data.eval_path", "data.eval_split", "data.eval_fraction"),
                )
        return value

    @field_validator("machine")
    @classmethod
    def _streaming_needs_data_from_the_hub(cls, value: Machine, info: ValidationInfo) -> Machine:
        data = info.data.get("data")
        if value.streaming and data is not None and not any(_is_on_the_hub(path) for path in data.paths):
            raise broken_rule(
                f"has an effect only on data from the Hub, and data.path is {data.path!r}, got true. Remove it.",
                key="streaming",
                involves=("data.path",),
            )
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return the complete recipe as plain values, ready for JSON or YAML."""
        # Without warnings: a recorded recipe may lack a required key, see `recipe_of_record`.
        return self.model_dump(mode="json", warnings=False)

    def flat(self) -> dict[str, Any]:
        """Return every key as ``section.key`` to value; an absent section has none."""
        return flat(self.to_dict())

    def learned(self) -> dict[str, Any]:
        """Return what decides the trained weights as ``section.key`` to value: two runs equal in it learn the same."""
        return learned(self.to_dict())

    def to_yaml(self) -> str:
        """Return the complete recipe as YAML, which loads as an equal recipe."""
        from .yaml_text import dump_yaml

        return dump_yaml(self.to_dict())
