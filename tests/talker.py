"""An adapter that answers something, made in seconds: the bundled base, pretrained on stories, and a random LoRA."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model

from qlora_neft import load_recipe
from qlora_neft.base.config import load_tokenizer
from qlora_neft.base.nf4 import load_nf4_base
from qlora_neft.paths import resolve_bundled

CONTEXT = 512  # tokens


def save_talker(folder: Path) -> Path:
    """Save an adapter as a run with Alpaca's prompt would; its answers differ from the base's."""
    base = resolve_bundled("bundled:demo/base")
    model = load_nf4_base(base, device=torch.device("cpu"), compute_dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, param in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param, std=0.1)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    recipe = load_recipe("demo", ["data.prompt_template=alpaca"]).to_dict()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder
