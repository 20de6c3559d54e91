"""A tiny random model of any causal decoder that transformers has, made from nothing but its configuration class.

Sizes are shrunk by the names that configurations share; `OVERRIDES` holds what a family needs beyond that.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

VOCABULARY, WIDTH, LAYERS = 260, 64, 2
SPECIAL = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}

# One size per name; a configuration takes those that it knows.
SIZES: dict[str, Any] = {
    # Width and depth.
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_embd": WIDTH, "d_model": WIDTH, "embedding_size": WIDTH,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    # Attention.
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2,
    "head_dim": 16, "kv_channels": 16, "attention_head_dim": 16, "n_positions": 256, "n_ctx": 256,
    "max_position_embeddings": 256, "max_seq_len": 256, "sliding_window": 128, "rotary_dim": 8,
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    # Feed-forward layers.
    "intermediate_size": 96, "ffn_dim": 96, "ffn_hidden_size": 96, "n_inner": 96, "d_ff": 96, "hidden_dim": 96,
    "word_embed_proj_dim": WIDTH, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    # Experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_num_shared_experts": 1,
    # State spaces.
    "state_size": 8, "mamba_d_state": 8, "ssm_state_size": 8, "mamba_d_conv": 4, "time_step_rank": 4,
    "mamba_dt_rank": 4, "lru_width": WIDTH,
}  # fmt: skip


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Return a family's configuration with sizes of a few dozen."""
    defaults = AutoConfig.for_model(model_type)
    return type(defaults)(**{**_shrunk(defaults), **OVERRIDES.get(model_type, {}), **overrides})


def tiny_whole(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Return the configuration of a model that also sees or hears, its text part and its towers shrunk."""
    defaults = AutoConfig.for_model(model_type)
    parts = {}
    for name in defaults.sub_configs:
        part = getattr(defaults, name, None)
        if isinstance(part, PreTrainedConfig):
            own = OVERRIDES.get(part.model_type, {}) if name == "text_config" else TOWER
            known = _names(type(part)) | set(part.attribute_map)
            parts[name] = {**_shrunk(part), **{k: v for k, v in own.items() if k in known or name == "text_config"}}
            parts[name]["model_type"] = part.model_type
    tokens = {n: 259 for n in _names(type(defaults)) if n.endswith(("_token_id", "_token_index")) and n not in SPECIAL}
    return type(defaults)(**{**parts, **tokens, **OVERRIDES.get(model_type, {}), **overrides})


def _shrunk(defaults: PreTrainedConfig) -> dict[str, Any]:
    names = _names(type(defaults)) | set(defaults.attribute_map)
    sizes = {name: size for name, size in (SIZES | SPECIAL).items() if name in names}
    sizes |= {name: 0.0 for name in names if "dropout" in name or name.endswith("pdrop")}
    # None means "as wide as": it stays what its family makes of it.
    return {name: size for name, size in sizes.items() if name in SPECIAL or _value(defaults, name) is not None}


def _value(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # layers may set it each for itself: there is one
        return True


def _names(config_class: type[PreTrainedConfig]) -> set[str]:
    names: set[str] = set()
    for one in config_class.__mro__:
        names |= set(getattr(one, "__annotations__", {}))
    return names | set(inspect.signature(config_class.__init__).parameters)


# Towers are never trained: they only have to be there, and small.
TOWER: dict[str, Any] = {
    "image_size": 28, "patch_size": 14, "num_channels": 3, "out_hidden_size": WIDTH, "projector_input_dim": 64,
    "projector_output_dim": 64, "vision_output_dim": 64, "depth": 1, "num_heads": 2, "spatial_merge_size": 1,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [],
}  # fmt: skip

ROBERTA = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
MLA = {"num_key_value_heads": 4, "head_dim": 8}
SSM2 = {"expand": 2, "num_heads": 8, "head_dim": 16, "n_groups": 1}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v3": MLA, "sarvam_mla": MLA, "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "axk2": MLA, "deepseek_v32": MLA, "glm4_moe_lite": MLA, "glm_moe_dsa": MLA, "longcat_flash": MLA,
    "deepseek_v2": MLA | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "camembert": ROBERTA, "data2vec-text": ROBERTA, "roberta": ROBERTA, "roberta-prelayernorm": ROBERTA,
    "xlm-roberta": ROBERTA, "xlm-roberta-xl": ROBERTA, "xmod": ROBERTA,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 8, "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 32,
    },
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 32},
    "axk1": MLA, "minicpm3": MLA, "youtu": MLA,
    "bailing_hybrid": MLA | {
        "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
    },
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": MLA | {
        "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 16, "linear_num_heads": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "cohere_compass_text": {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }},
    "dots3_note_text": {"num_key_value_heads": 4},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY}, "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 64},
    "hunyuan_v1_dense": {"head_dim": 16}, "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": SSM2, "ministral": {"head_dim": 16}, "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen3_5_text": LINEAR, "qwen3_5_moe_text": LINEAR, "qwen3_next": LINEAR, "qwen4_exp_text": LINEAR | INDEXER,
    # Its cache rounds widths up to 64, its layers do not: of the released one both are the same.
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * 2, "local_attn_chunk_length": 256,
    },
    "zamba": {"layers_block_type": ["hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1}, "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
