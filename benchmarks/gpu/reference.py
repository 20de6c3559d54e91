"""The first step in float32, one sequence at a time: nothing padded, packed, fused, checkpointed or rounded.

Transformers' own model with PEFT's own layers on the same NF4 bytes. An arm whose loss or gradient is far from it has
computed something else, however fast.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from .bases import nf4_base, set_adapters
from .lengths import IGNORE_INDEX, distribution, rows
from .meters import kept_gradients
from .trainers import Place

BASE, LENGTHS = "7b", "alpaca"  # what arms are checked on


def reference_name(base: str) -> str:
    """Return the name of the result."""
    return f"reference-{base}"


def gradients_path(state: Path, base: str) -> Path:
    """Return where the gradients are."""
    return state / f"{reference_name(base)}.safetensors"


def blocks_of(sizes: Mapping[str, int]) -> set[int]:
    """Return the blocks whose gradients are compared: the first, which all others' errors reach, a middle, the last."""
    last = sizes["num_hidden_layers"] - 1
    return {0, last // 2, last}


def reference(place: Place) -> dict[str, Any]:
    """Compute loss and gradients of the first step; write the gradients."""
    began = time.perf_counter()
    torch.set_float32_matmul_precision("highest")
    sizes = place.sizes(BASE)
    base: Any = nf4_base(sizes, place.device, torch.float32)
    lora = LoraConfig(**place.lora(dropout=False), target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    set_adapters(model)
    data = rows(distribution(LENGTHS, tiny=place.tiny), 1, sizes["vocab_size"])
    labelled = sum(label != IGNORE_INDEX for row in data for label in row["labels"])
    total = 0.0
    for row in data:
        ids, labels = (torch.tensor([row[key]], device=place.device) for key in ("input_ids", "labels"))  # (1, L)
        logits = model(input_ids=ids).logits[0, :-1]  # (L - 1, V)
        loss = cross_entropy(logits.float(), labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum") / labelled
        loss.backward()
        total += loss.item()
    place.state.mkdir(parents=True, exist_ok=True)
    save_file(kept_gradients(model, blocks_of(sizes)), gradients_path(place.state, BASE))
    return {"loss": total, "labelled_tokens": labelled, "seconds_in_all": time.perf_counter() - began}
