"""Find out which model families may be flattened: sequences in one row compute what each of them computes alone.

    python -m scripts.probe_flattening                 # all causal decoders of transformers, a minute; writes the list
    python -m scripts.probe_flattening llama bloom     # some of them, printed only

Each family is built tiny and random, with a window shorter than the sequences where it has one. Logits of every
sequence alone (transformers' own attention) and of all of them flattened (ours) must be equal, and so must the gradient
of the embeddings. What differs, raises, or does not hand the bounds down stays padded; whether transformers' own block
masks keep such a family's sequences apart is found out too, for those who ask for flattening or packing. A family that
would not notice if its sequences saw each other proves nothing and is left out.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import qlora_neft.base
from qlora_neft.base.flattening import DROPOUT
from qlora_neft.fused.attention import PER_SEQUENCE, FlattenedAttention, FlatteningCollator

LIST = Path(qlora_neft.base.__file__).with_name("flattening.json")
LENGTHS = (13, 1, 9, 13)  # the window is shorter, one sequence is a single token
VOCABULARY = 64
TOLERANCE = 1e-4  # of logits around 1, float32
PARAMETERS = 40_000_000  # a family that cannot be made smaller is not probed
# Attributes that make any configuration small; those that it does not have are left out.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "n_ctx": 64,
    "n_inner": 48,
    "d_model": 32,
    "n_layers": 4,
    "n_heads": 4,
    "num_layers": 4,
    "num_heads": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "local_attention": 5,
    "window_size": 5,
    "attention_chunk_size": 5,
    "index_topk": 4,
    "index_block_size": 2,
    "index_topk_blocks": 2,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "num_kv_shared_layers": 0,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "lru_width": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Mixtures that released checkpoints have and the configuration's defaults do not.
CONV_AND_ATTENTION = {"layer_types": ["conv", "full_attention"] * 2}
EXTRA: dict[str, dict[str, Any]] = {"lfm2": CONV_AND_ATTENTION, "lfm2_moe": CONV_AND_ATTENTION}


def main(names: list[str]) -> int:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    found = {}
    for name in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            found[name] = verdict(name)
            print(f"{name:>28}  {found[name]}", flush=True)
        except NotProbed as reason:
            print(f"{name:>28}  not probed: {reason}", flush=True)
    if not names:
        content = {
            "flattens": [name for name, (ours, _) in found.items() if not ours],
            "padded": {name: ours for name, (ours, _) in found.items() if ours},
            "kept_apart_by_masks": [name for name, (ours, theirs) in found.items() if not theirs],
            "attention_dropout": {name: p for name, (ours, _) in found.items() if not ours and (p := dropout_of(name))},
        }
        LIST.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def dropout_of(model_type: str) -> float:
    """Return the probability with which a family drops attention weights unless its configuration says otherwise."""
    config = transformers.CONFIG_MAPPING[model_type]()
    return max(getattr(config, name, None) or 0.0 for name in DROPOUT)


class NotProbed(Exception):
    """A family cannot be built tiny, or proves nothing."""


def verdict(model_type: str) -> tuple[str, str]:
    """Return why a family must not be flattened under our attention, and under transformers' own; "" where it may.

    Raises:
        NotProbed: If nothing is known.
    """
    try:
        model = tiny_model(model_type)
        alone = [logits_and_gradient(model, [row]) for row in rows()]
        mixed = logits_and_gradient(model, rows(), mixing=True)
    except Exception as error:  # whatever a family raises that is built from a handful of guessed sizes
        raise NotProbed(f"{type(error).__name__}: {str(error)[:90]}") from error
    expected = torch.cat([logits for logits, _ in alone], dim=1), sum(gradient for _, gradient in alone)
    if not _apart(mixed, expected) > 10 * TOLERANCE:
        raise NotProbed("it would not notice if sequences saw each other")
    return _problem(model, expected, PER_SEQUENCE), _problem(model, expected, "sdpa")


def _problem(model: PreTrainedModel, expected: tuple[Tensor, Any], implementation: str) -> str:
    try:
        found = logits_and_gradient(model, rows(), implementation)
    except NotImplementedError as error:
        return str(error)
    except Exception:  # noqa: BLE001  # any refusal is one
        return "the model refuses flattened rows"
    return "" if _apart(found, expected) < TOLERANCE else "sequences of a flattened row would see each other"


def tiny_model(model_type: str) -> PreTrainedModel:
    """Return a tiny random model of a family, float32, without dropout."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    count = sum(param.numel() for param in skeleton.parameters())
    if count > PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() >= 2:
                param.normal_(0, 0.3)  # so that attention is far from uniform
    return model.eval()


def tiny_config(model_type: str) -> PreTrainedConfig:
    config_class = transformers.CONFIG_MAPPING[model_type]
    known = set(getattr(config_class, "__dataclass_fields__", {})) | set(config_class().to_dict())
    known |= set(getattr(config_class, "attribute_map", {}))
    # A configuration that renames an attribute takes it by one of its names only.
    renamed = set(getattr(config_class, "attribute_map", {}).values())
    small = {key: value for key, value in SMALL.items() if key in known and key not in renamed | {"layer_types"}}
    if "kv_lora_rank" in small:  # latent attention has no grouped queries
        small["num_key_value_heads"] = small["num_attention_heads"]
    return config_class(**{**small, **EXTRA.get(model_type, {})})


def rows() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in LENGTHS]


def logits_and_gradient(
    model: PreTrainedModel, rows: list[list[int]], implementation: str = "sdpa", *, mixing: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the logits of rows, flattened if there are several, and the gradient of their squares in the embedding.

    ``mixing`` lets every token see all before it, in other rows too: positions restart, and a mask of ones is given.
    """
    collator = FlatteningCollator(0) if len(rows) > 1 else DataCollatorForLanguageModeling(0)
    batch = collator([{"input_ids": row} for row in rows])
    if mixing:
        batch = {"position_ids": batch["position_ids"], "input_ids": batch["input_ids"]}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch.pop("labels", None)
    model.zero_grad()
    with FlattenedAttention(model, implementation).over(batch) as inputs:
        logits = model(**inputs, use_cache=False).logits
        logits.square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert isinstance(gradient, Tensor)
    return logits.detach(), gradient.clone()


def _apart(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Any]) -> float:
    """Return the largest relative difference of logits and gradients."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
