"""The trainers of the arms, on bases of random weights, with the rows of a run in the order they are listed in."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler

from .bases import make_tokenizer, nf4_base, set_adapters
from .lengths import Lengths, distribution, rows
from .plan import ARMS, LEARNING_RATE, LORA, NOISE_ALPHA, SEED, TOKENS, Arm, Run, geometry

GIB = 2**30
CONTEXT = 0.55e9  # bytes of a CUDA context, which the allocator's limit does not count
TINY_R = 4
LOG_STEPS = 10  # TRL's default
NO_CLIPPING = 1e9  # gradients as they are, scaled by exactly 1
STEP_ONE_RATE = 1e-9  # of a step that is taken for its gradient alone


@dataclass(frozen=True)
class Place:
    """Where a session runs.

    Attributes:
        device: Of the model.
        state: Folder of the whole measurement.
        tiny: Whether it is a rehearsal on tiny models.
    """

    device: torch.device
    state: Path
    tiny: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @property
    def optim(self) -> str:
        """The optimizer of every arm; not a paged one: pages are a driver's business, which differs."""
        return "adamw_8bit" if self.on_gpu else "adamw_torch"

    @property
    def dtype(self) -> torch.dtype:
        """What upstream's arms compute in."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def sizes(self, base: str) -> dict[str, int]:
        """Return the sizes of a base."""
        return geometry(base, tiny=self.tiny)

    def lengths(self, run: Run) -> Lengths:
        """Return the distribution of a run."""
        return distribution(run.lengths, tiny=self.tiny)

    def lora(self, *, dropout: bool) -> dict[str, Any]:
        """Return the settings of LoRA."""
        chosen: dict[str, Any] = dict(LORA)
        return chosen | ({"r": TINY_R} if self.tiny else {}) | ({} if dropout else {"lora_dropout": 0.0})


@dataclass(frozen=True)
class Built:
    """A trainer ready to train.

    Attributes:
        trainer: It counts its forward passes, see `measured`.
        switches: What it was told beyond what all arms are.
        estimate: The planner's estimate, for our own arms: bytes by name, ``peak`` among them.
        checkpointing: Whether blocks recompute their activations.
    """

    trainer: Any
    switches: dict[str, Any]
    estimate: dict[str, int] | None = None
    checkpointing: bool = False


def build(run: Run, place: Place, steps: int, *, check: bool = False) -> Built:
    """Return a run's trainer.

    Args:
        run: What is measured.
        place: Where.
        steps: Optimizer steps that it will take.
        check: Without noise and dropout and hardly a learning rate: a step taken for its loss and gradient.
    """
    arm = ARMS[run.arm]
    data = rows(place.lengths(run), steps, place.sizes(run.base)["vocab_size"])
    make = {"ours": _ours, "trl": _trl, "unsloth": _unsloth, "crash": _crash}[arm.trainer]
    built = make(run, arm, place, data, check)
    set_adapters(built.trainer.model)
    return built


def measured(trainer_class: type) -> Any:
    """Return a subclass that takes rows as they come and counts its forward passes, without asking the device."""

    class Measured(trainer_class):
        forwards = positions = largest = 0

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.forwards += 1
            self.positions += inputs["input_ids"].numel()  # padding included
            self.largest = max(self.largest, inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Measured


# ---- Ours: a recipe, planned and built as `qlora-neft train` does it ----


def _ours(run: Run, arm: Arm, place: Place, data: list[dict[str, Any]], check: bool) -> Built:
    from datasets import Dataset
    from rich.console import Console

    from qlora_neft import load_recipe
    from qlora_neft.data.prepare import PreparedData
    from qlora_neft.fit import Card
    from qlora_neft.runner.build import Run as OurRun
    from qlora_neft.runner.build import policy_of
    from qlora_neft.runner.build_trainer import trainer_of
    from qlora_neft.runner.plan import plan_of
    from qlora_neft.trainer import QLoRANeftTrainer

    lengths = place.lengths(run)
    recipe = load_recipe("llama2-7b-alpaca", overrides(run, arm, place, check))
    policy = policy_of(recipe)
    prepared = PreparedData(Dataset.from_list(data), None, {}, -1, (2,), None, False)  # ty: ignore[invalid-argument-type]
    base = nf4_base(place.sizes(run.base), place.device, policy.compute_dtype, _attention(recipe))
    card = None if run.cap_gib is None or not place.on_gpu else Card(f"{run.cap_gib:g} GiB", int(run.cap_gib * GIB))
    plan = plan_of(recipe, policy, prepared, base.config, card)
    folder = Path(tempfile.mkdtemp(dir=place.state))
    ours = OurRun(
        recipe, folder, Console(quiet=True), time.monotonic(), policy, base.config, make_tokenizer(), prepared, plan
    )
    trainer = trainer_of(ours, measured(QLoRANeftTrainer), model=base)
    # Planned once more for the largest micro-batch that the rows really make: the estimate is of that one.
    tokens = _largest(trainer, [len(row["input_ids"]) for row in data], lengths.sequences_per_step)
    exact = load_recipe(
        "llama2-7b-alpaca",
        [
            *overrides(run, arm, place, check),
            f"machine.max_tokens_per_micro_batch={tokens}",
            f"machine.activation_checkpointing={str(plan.activation_checkpointing).lower()}",
            f"data.max_length={min(tokens, lengths.most)}",
        ],
    )
    memory = plan_of(exact, policy, prepared, base.config, card).memory_estimate
    estimate = None if memory is None else {**memory.terms, "peak": memory.peak_bytes}
    switches = {**recipe.machine.model_dump(mode="json"), "plan": list(plan.notes), "policy": str(policy)}
    return Built(trainer, switches, estimate, plan.activation_checkpointing)


def overrides(run: Run, arm: Arm, place: Place, check: bool) -> list[str]:
    """Return what a run's recipe says otherwise than the shipped one for Llama-2-7B."""
    lengths = place.lengths(run)
    values: dict[str, Any] = {f"lora.{key}": value for key, value in place.lora(dropout=not check).items()}
    values |= {
        "neftune.noise_alpha": 0.0 if check else NOISE_ALPHA,
        "data.max_length": lengths.most,
        "train.effective_batch_size": lengths.sequences_per_step,
        "train.learning_rate": STEP_ONE_RATE if check else LEARNING_RATE,
        "train.optim": place.optim,
        "train.max_grad_norm": NO_CLIPPING if check else 0.3,
        "train.seed": SEED,
        "machine.logging_steps": 1 if check else LOG_STEPS,
        "machine.clean_loss_steps": 0,
        "machine.save_every_minutes": 0,
    }
    if place.device.type == "cpu":
        values["machine.device"] = "cpu"
    switches = dict(arm.switches)
    checkpointing = switches.pop("checkpointing", None)
    if run.cap_gib is None:  # under a cap the planner decides
        values |= {"machine.max_tokens_per_micro_batch": TOKENS, "machine.activation_checkpointing": checkpointing}
    values |= {f"machine.{key}": value for key, value in switches.items()}
    return [f"{key}={_yaml(value)}" for key, value in values.items()]


def _yaml(value: Any) -> str:
    return (
        str(value).lower() if isinstance(value, bool) else f"{value:.10f}" if isinstance(value, float) else str(value)
    )


def _attention(recipe: Any) -> str:
    asked = recipe.machine.model_dump().get("attn_implementation", "auto")
    return "sdpa" if asked == "auto" else asked


def _largest(trainer: Any, lengths: Sequence[int], size: int) -> int:
    """Return the tokens of the largest micro-batch, padding counted."""
    from qlora_neft.steps.batch import split_rows

    flat, split = trainer.padding_free, trainer.split
    largest = 0
    for at in range(0, len(lengths), size):
        step = lengths[at : at + size]
        for part in split_rows(step, split.rows, split.tokens, padded=not flat):
            drawn = [step[i] for i in part]
            largest = max(largest, sum(drawn) if flat else len(drawn) * max(drawn))
    return largest


# ---- TRL's ----


def _trl(run: Run, arm: Arm, place: Place, data: list[dict[str, Any]], check: bool) -> Built:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    switches = dict(arm.switches)
    arguments = _sft_arguments(run, place, switches, check, SFTConfig)
    trainer = measured(SFTTrainer)(
        nf4_base(place.sizes(run.base), place.device, place.dtype),
        SFTConfig(**arguments),
        train_dataset=Dataset.from_list(data),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(**place.lora(dropout=not check), target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    return Built(trainer, switches, checkpointing=switches["checkpointing"])


def _sft_arguments(run: Run, place: Place, switches: dict[str, Any], check: bool, config_class: type) -> dict[str, Any]:
    """Return the arguments of TRL's configuration, and complete an arm's switches by what they become here."""
    lengths = place.lengths(run)
    tuned = "checkpointing" in switches
    # Eight rows are TRL's default; a tuned run takes as many as make our own micro-batches.
    rows_at_once = min(lengths.rows_per_micro_batch if tuned else 8, lengths.sequences_per_step)
    if switches.get("use_liger_kernel") and not (place.on_gpu and find_spec("liger_kernel")):
        switches["use_liger_kernel"] = False  # its kernels need both
    chosen = {key: value for key, value in switches.items() if key != "checkpointing"}
    if tuned:
        # Renamed by transformers between 5.17 and 5.24, which warns about the old name.
        names = {field.name for field in fields(config_class)}
        new = "activation_checkpointing"
        chosen[new if new in names else "gradient_checkpointing"] = switches["checkpointing"]
        if new in names:
            chosen["gradient_checkpointing"] = None  # TRL's default for the old one is True
    switches.setdefault("checkpointing", True)  # TRL's default
    switches |= {"rows_per_micro_batch": rows_at_once, "optim": place.optim}
    return {
        "output_dir": tempfile.mkdtemp(dir=place.state),
        "per_device_train_batch_size": rows_at_once,
        "gradient_accumulation_steps": lengths.sequences_per_step // rows_at_once,
        "num_train_epochs": 1,
        "learning_rate": STEP_ONE_RATE if check else LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": place.optim,
        "max_grad_norm": NO_CLIPPING if check else 0.3,
        "neftune_noise_alpha": None if check else NOISE_ALPHA,
        "seed": SEED,
        "max_length": None,  # the rows are cut already
        "logging_steps": 1 if check else LOG_STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": place.on_gpu,
        "use_cpu": not place.on_gpu,
        **chosen,
    }


# ---- Unsloth's, in an environment of its own, which has no need of this project's packages ----


def _unsloth(run: Run, arm: Arm, place: Place, data: list[dict[str, Any]], check: bool) -> Built:
    from unsloth import FastLanguageModel  # the session has imported it before everything else

    from datasets import Dataset  # isort: skip
    from trl import SFTConfig, SFTTrainer  # isort: skip

    switches = dict(arm.switches)
    arguments = _sft_arguments(run, place, switches, check, SFTConfig)
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        arguments.pop(name, None)  # decided below, by its own argument
    folder = place.state / f"base-{run.base}"  # a session of its own has written it
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=2048,
        dtype=place.dtype,
        load_in_4bit=True,
        use_gradient_checkpointing=False,
        use_exact_model_name=True,
        fix_tokenizer=False,  # one in name only cannot be fixed
    )
    lora = place.lora(dropout=not check)
    model = FastLanguageModel.get_peft_model(
        model,
        r=lora["r"],
        lora_alpha=lora["lora_alpha"],
        lora_dropout=lora["lora_dropout"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        bias="none",
        use_gradient_checkpointing=False,
        random_state=SEED,
    )
    trainer = measured(SFTTrainer)(
        model=model,
        args=SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    return Built(trainer, switches)


def _crash(run: Run, arm: Arm, place: Place, data: list[dict[str, Any]], check: bool) -> Built:
    raise RuntimeError("this arm fails on purpose")
