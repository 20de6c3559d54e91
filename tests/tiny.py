"""Tiny models, tokenizers and rows with real components: random weights, real NF4, real trainers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed

from qlora_neft.trainer import QLoRANeftConfig, QLoRANeftTrainer
from scripts.families.tokenizer import byte_tokenizer

VOCABULARY = 260  # 256 bytes, then <pad>, <s>, </s>, <unk>
WIDTH = 64

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
WINDOW = {"sliding_window": 128}  # where attention has one; elsewhere the cache alone would heed it
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": WIDTH, "dropout": 0.0}),
    "mistral": ("MistralConfig", WINDOW),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", WINDOW),
    "gemma3": ("Gemma3TextConfig", WINDOW),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {}),
}

MIXES_SEQUENCES = {"bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4})}  # if its rows are flattened


def save_tiny_model(folder: Path, architecture: str = "llama", **overrides: Any) -> Path:
    """A random model of the architecture and a byte tokenizer, saved as any checkpoint is."""
    name, extra = {**ARCHITECTURES, **MIXES_SEQUENCES}[architecture]
    config_class = getattr(transformers, name)
    config = config_class(**{**SIZES, **extra, **overrides})
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Random weights of the default std 0.02 make near-uniform predictions; larger ones make gradients worth comparing.
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 2 and "embed" not in name:
                param.mul_(4)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def rows_of_lengths(lengths: list[int], seed: int = 0) -> Dataset:
    """Tokenized rows of given lengths; the first third of each is prompt, without loss."""
    draw = random.Random(seed)
    rows = []
    for length in lengths:
        ids = [draw.randrange(256) for _ in range(length - 1)] + [258]
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return Dataset.from_list(rows)


def mixed_rows(count: int, seed: int = 0) -> Dataset:
    """Tokenized rows of 4 to 40 tokens."""
    draw = random.Random(seed)
    return rows_of_lengths([draw.randint(4, 40) for _ in range(count)], seed)


def tiny_config(folder: Path, **overrides: Any) -> QLoRANeftConfig:
    """Arguments for a few fp32 steps on the CPU that write nothing."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,  # also on a CPU with bf16 matrix units: the invariants are stated in float32
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "clean_loss_steps": 0,
        "neftune_noise_alpha": 5.0,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return QLoRANeftConfig(**{**defaults, **overrides})


def tiny_lora(**overrides: Any) -> LoraConfig:
    """A rank-8 adapter on every linear layer, without dropout unless asked for."""
    defaults = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **overrides})


def tiny_trainer(model: Any, folder: Path, rows: Dataset | None = None, **overrides: Any) -> QLoRANeftTrainer:
    """A trainer on a tiny model; ``lora_dropout`` and trainer arguments may be overridden by name."""
    names = ("eval_dataset", "data_collator", "peft_config", "callbacks", "processing_class", "quantization_config")
    own = {name: overrides.pop(name) for name in names if name in overrides}
    own.setdefault("peft_config", tiny_lora(lora_dropout=overrides.pop("lora_dropout", 0.0)))
    return QLoRANeftTrainer(
        str(model) if isinstance(model, Path) else model,
        tiny_config(folder, **overrides),
        train_dataset=mixed_rows(24) if rows is None else rows,
        **own,
    )


def losses(trainer: Any) -> list[float]:
    """Train losses, one per logged step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def gradient_norms(trainer: Any) -> list[float]:
    """Gradient norms, one per logged step."""
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def adapter_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Trained parameters by name."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def max_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference between two sets of weights of the same names."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_learned_alike(a, b, tolerance=1e-4):
    """Two trainers have the same losses and adapters within rounding."""
    import pytest

    assert losses(a) == pytest.approx(losses(b), abs=tolerance)
    assert max_difference(adapter_weights(a), adapter_weights(b)) < tolerance
