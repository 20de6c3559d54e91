"""Models of one and of two layers, trained for one micro-batch at two lengths through the trainer's own step."""

from __future__ import annotations

import gc
import itertools
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, PrinterCallback, set_seed

from qlora_neft.base.lora import lora_config
from qlora_neft.recipe.schema import Lora
from qlora_neft.trainer import QLoRANeftConfig, QLoRANeftTrainer

from .counter import KINDS, OTHER, StepCounter

ROWS = 2  # of the micro-batch: with a single one, a transposed tensor would be contiguous by chance
LENGTHS = (37, 53)  # tokens of a row; prime, so that no other dimension has this size
VOCABULARY = 128


# An eighth of Llama-2-7B in every width; its r 64 is r 8 here.
LLAMA = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
# Small models with the shapes of well-known ones: groups of queries, biases, fused projections, norms of heads.
_GROUPED = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": 4096,
}
_PLAIN = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "mistral": ("MistralConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _GROUPED),
    "gemma2": ("Gemma2Config", _GROUPED),
    "gemma3_text": ("Gemma3TextConfig", _GROUPED),
    "gpt_neox": ("GPTNeoXConfig", _PLAIN),
    "phi": ("PhiConfig", _PLAIN),
    "opt": (
        "OPTConfig",
        {"hidden_size": 256, "ffn_dim": 1024, "num_attention_heads": 4, "word_embed_proj_dim": 256, "dropout": 0.0},
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        family: Of `FAMILIES`.
        keys: Of its configuration, in place of some of `FAMILIES`.
        r, dropout: Of LoRA on all linear layers.
        precision: ``"bf16"`` or ``"fp32"``.
        checkpointing: True for all blocks, False for none.
        trainer: ``"ours"``, or ``"trl"`` for plain TRL with a QLoRA configuration.
        padding_free: Whether rows are joined.
        as_on_cuda: Whether fused functions count as one launch.
        arguments: Further arguments of the trainer.
    """

    family: str = "llama"
    keys: dict[str, Any] = field(default_factory=dict)
    r: int = 8
    dropout: float = 0.1
    precision: str = "bf16"
    checkpointing: bool = False
    trainer: str = "ours"
    padding_free: bool = False
    as_on_cuda: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """What a micro-batch costs: bytes per token and layer, the rest per layer or per micro-batch.

    Attributes:
        bytes: Read and written, by kind, forward and backward.
        launches: By kind, in one layer.
        kept: Bytes kept for the backward pass.
        peak: Bytes alive at most in one block, forward or backward, what it keeps included.
        waits: Places where the host waits, in a step of one micro-batch and two layers; `waits_at`: with their lines.
        waits_a_layer: Those of two layers less those of one.
    """

    bytes: dict[str, float]
    launches: dict[str, int]
    kept: float
    peak: float
    waits: dict[str, int]
    waits_a_layer: int
    waits_at: dict[str, int]

    @property
    def moved(self) -> float:
        """Bytes of everything but base products, attention and unpacking."""
        return self.bytes[OTHER]


def count(arm: Arm, lengths: tuple[int, int] = LENGTHS) -> Counts:
    """Count one arm: the second difference over layers and lengths, so that everything constant drops out."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        bases = {layers: _save_base(Path(folder) / str(layers), arm, layers) for layers in (1, 2)}
        found = {
            (layers, length): _run(arm, bases[layers], Path(folder), length)
            for layers, length in itertools.product((1, 2), lengths)
        }
    short, long = lengths
    tokens = ROWS * (long - short)

    def slope(value: Any) -> float:
        by_layer = [value(found[2, n]) - value(found[1, n]) for n in (short, long)]
        return (by_layer[1] - by_layer[0]) / tokens

    one, two = found[1, long], found[2, long]
    return Counts(
        bytes={kind: slope(lambda c, kind=kind: c.bytes[kind]) for kind in KINDS},
        launches={kind: two.launches[kind] - one.launches[kind] for kind in KINDS},
        kept=slope(lambda c: c.kept),
        # Of one layer: with more of them, what the others keep is alive as well.
        peak=(found[1, long].peak - found[1, short].peak) / tokens,
        waits=dict(two.waits),
        waits_at=dict(two.waits_at),
        waits_a_layer=two.waits.total() - one.waits.total(),
    )


def operations(arm: Arm, length: int = LENGTHS[1]) -> list[tuple[str, str, int, float]]:
    """Return what a layer runs: kind, operation, launches, bytes a token, most bytes first."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        one, two = (_run(arm, _save_base(Path(folder) / str(n), arm, n), Path(folder), length) for n in (1, 2))
    rows = [
        (*key, two.operations[key] - one.operations[key], (two.bytes_of[key] - one.bytes_of[key]) / (ROWS * length))
        for key in two.operations
        if two.operations[key] != one.operations[key]
    ]
    return sorted(rows, key=lambda row: -row[3])


def block(arm: Arm, length: int = LENGTHS[0]) -> tuple[float, float, float]:
    """Count one decoder block alone, in bytes a token.

    Returns:
        What it keeps for the backward pass; what is alive in it at most; and the same if it is checkpointed.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        base = _save_base(Path(folder) / "base", arm, 1)
        plain = _run(arm, base, Path(folder), length, inner=True)
        checkpointed = _run(replace(arm, checkpointing=True), base, Path(folder), length, inner=True)
    found = (plain.kept_in_blocks, plain.peak, checkpointed.peak)
    kept, peak, again = (size / (ROWS * length) for size in found)
    return kept, peak, again


# ---- One run ----


def _run(arm: Arm, base: Path, folder: Path, length: int, *, inner: bool = False) -> StepCounter:
    """Train one optimizer step of one micro-batch, and return its counts.

    Args:
        arm, base, folder, length: What is trained, and where.
        inner: Whether the first block's input has a gradient, as that of every other block has.
    """
    trainer = _trainer(arm, base, folder, length)
    if inner:
        trainer.model.get_base_model().enable_input_require_grads()
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.counter


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and advice off the screen."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Upstream collects garbage before each run: what is there now need not be walked through again.
    gc.freeze()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.unfreeze()
        transformers.logging.enable_progress_bar()
        transformers.logging.set_verbosity(level)


def _counted(trainer_class: type, arm: Arm, length: int) -> type:
    """Return a trainer whose `training_step` is counted."""

    class Counted(trainer_class):
        counter: StepCounter

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            lengths = {length, ROWS * length} if arm.padding_free else {length}
            self.counter = StepCounter(model, lengths, as_on_cuda=arm.as_on_cuda)
            with self.counter:
                return super().training_step(model, inputs, *args, **kwargs)

        def _prepare_inputs(self, inputs: Any) -> Any:
            prepared = super()._prepare_inputs(inputs)
            if not isinstance(prepared, dict):  # a whole step: its micro-batches move one by one
                return prepared
            # Copies, as on a device: what is asked of the collator's own tensors costs no wait.
            prepared = {key: value.clone() if isinstance(value, Tensor) else value for key, value in prepared.items()}
            self.counter.on_device(prepared)
            return prepared

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.counter.keep_contexts(loss[0] if isinstance(loss, tuple) else loss)
            return loss

    return Counted


def _trainer(arm: Arm, base: Path, folder: Path, length: int) -> Any:
    half = arm.precision == "bf16"
    common = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": half,
        "max_steps": 1,
        "per_device_train_batch_size": ROWS,
        "padding_free": arm.padding_free,
        "gradient_checkpointing": arm.checkpointing,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "logging_first_step": False,
        "max_length": None,
        "dataloader_pin_memory": False,
        "neftune_noise_alpha": 5.0,
    } | arm.arguments
    lora = lora_config(Lora(r=arm.r, lora_alpha=16, lora_dropout=arm.dropout, target_modules="all-linear"))
    shared = {"train_dataset": _rows(length), "processing_class": _tokenizer(), "peft_config": lora}
    if arm.trainer == "ours":
        args = QLoRANeftConfig(**common, clean_loss_steps=0, max_tokens_per_micro_batch=ROWS * length)
        return _counted(QLoRANeftTrainer, arm, length)(str(base), args, **shared)
    from trl import SFTConfig, SFTTrainer

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32,
    )
    common["model_init_kwargs"] = {"dtype": "bfloat16" if half else "float32"}
    return _counted(SFTTrainer, arm, length)(str(base), SFTConfig(**common), quantization_config=nf4, **shared)


def _save_base(folder: Path, arm: Arm, layers: int) -> Path:
    name, keys = FAMILIES[arm.family]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "num_hidden_layers": layers}
    config = getattr(transformers, name)(**sizes | special | keys | arm.keys)
    set_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def _rows(length: int) -> Dataset:
    rows = [[5 + (7 * i + 3 * row) % 100 for i in range(length)] for row in range(ROWS)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer in name only: the rows are token ids already."""
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
