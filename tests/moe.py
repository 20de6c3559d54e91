"""Tiny mixtures of experts, each family in its own layout, and a reference that computes them in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from tiny import SIZES, byte_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from qlora_neft.base.experts import QuantizedExperts, expert_modules
from qlora_neft.base.nf4 import from_nf4

EXPERTS = {"num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2}
SHARED = {"moe_intermediate_size": 40, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {"moe_intermediate_size": 40, "mlp_only_layers": [0]}),
    "qwen2_moe": ("Qwen2MoeConfig", {"moe_intermediate_size": 40, "shared_expert_intermediate_size": 32}),
    "olmoe": ("OlmoeConfig", {}),
    "granitemoe": ("GraniteMoeConfig", {}),
    "gpt_oss": ("GptOssConfig", {}),  # transposed, with biases, gate and up interleaved
    "deepseek_v2": ("DeepseekV2Config", {**SHARED, **LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", {**SHARED, **LATENT, "q_lora_rank": 16, "head_dim": 8}),
    # Every expert sees every token; PEFT takes its matrices for the other way round.
    "llama4_text": ("Llama4TextConfig", {"intermediate_size_mlp": 80, "interleave_moe_layer_step": 2}),
    "glm4_moe": ("Glm4MoeConfig", SHARED),
}


def save_moe(folder: Path, family: str, **overrides: Any) -> Path:
    """A random mixture of experts and a byte tokenizer, saved as any checkpoint is."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **EXPERTS, **extra, **overrides})
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() >= 2 and "embed" not in name:
                param.normal_(0, 0.08)  # as in `save_tiny_model`: gradients worth comparing
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def reference(folder: Path, loaded: PreTrainedModel, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """transformers' own model on the values that the loaded base stands for, its experts one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if type(model).__name__ != "Llama4ForCausalLM":  # which has no other
        model.set_experts_implementation("eager")
    own = dict(loaded.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(own[name], Linear4bit):
                module.weight.copy_(from_nf4(own[name].weight))
        for name, experts in expert_modules(model):
            packed = own[name]
            assert isinstance(packed, QuantizedExperts)
            for stack in packed.weight_names():
                for expert in range(packed.num_experts):
                    getattr(experts, stack)[expert] = packed.matrix(stack, expert)
    return model.to(dtype)
