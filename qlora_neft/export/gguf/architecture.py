"""The architectures that can be written as GGUF: names, shapes, and where llama.cpp expects what."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from ...base.config import read_config
from ...errors import UserInputError
from .file import gguf_library

if TYPE_CHECKING:
    from gguf import GGUFWriter

# transformers' class: llama.cpp's architecture. llama.cpp has one for Llama and Mistral.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True)
class Architecture:
    """A model's kind and shape.

    Attributes:
        name: llama.cpp's name of the architecture.
        config: transformers' configuration; its fields differ from class to class.
    """

    name: str
    config: Any

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def is_tied(self) -> bool:
        """Whether the head shares its weight with the embedding."""
        return bool(self.config.tie_word_embeddings)

    def namer(self) -> Callable[[str], str | None]:
        """Return a function from transformers' name of a weight to GGUF's, None where llama.cpp has no place for it."""
        gguf = gguf_library()
        # The library's own map of names, so that a GGUF written here names its tensors as llama.cpp's converter does.
        arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        names = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)
        return lambda key: names.get_name(key, try_suffixes=(".weight", ".bias"))

    def rows_for_llama_cpp(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Put the rows of a weight, bias or LoRA B where llama.cpp looks for them.

        transformers rotates the first half of a head against the second; llama.cpp's ``llama`` rotates neighbours, as
        in Meta's checkpoints. So the rows of each head of q and k go from (2, half) to (half, 2). llama.cpp's other
        architectures rotate as transformers does.
        """
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        num_heads = heads.get(key.split(".")[-2])
        if self.name != "llama" or num_heads is None:
            return tensor
        # (heads * 2 * half, ...) as (heads, 2, half, ...), its middle axes swapped. LoRA A stays: it acts on a layer's
        # input.
        half = tensor.shape[0] // num_heads // 2
        return tensor.reshape(num_heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def read_model_config(name_or_path: str, revision: str | None = None) -> PreTrainedConfig:
    """Read transformers' configuration of a model.

    Raises:
        UserInputError: If there is none.
    """
    refusal = (
        f"{name_or_path}: no model configuration can be read. Give a folder with a config.json, or a base that you can "
        "reach with --base."
    )
    return read_config(name_or_path, refusal, revision=revision)


def architecture_of(config: Any, source: str) -> Architecture:
    """Return the architecture of a model that can be written.

    Args:
        config: transformers' configuration.
        source: Name the caller gave, for messages.

    Raises:
        UserInputError: If llama.cpp would compute something else, or this program cannot write it.
    """
    classes = config.architectures or []
    name = next((ARCHITECTURES[found] for found in classes if found in ARCHITECTURES), None)
    if name is None:
        raise UserInputError(
            f"{source}: {', '.join(classes) or config.model_type} cannot be written as GGUF here. Supported: "
            f"{', '.join(ARCHITECTURES)}. llama.cpp's convert_hf_to_gguf.py knows more, for a merged model."
        )
    _check(config, source)
    return Architecture(name, config)


def _check(config: Any, source: str) -> None:
    """Refuse what the architecture's name does not say, so that llama.cpp would omit it."""
    rope = _rope(config)
    problems = []
    # llama.cpp's graph of an architecture is fixed: it would compute SiLU, full rotation and full attention whatever
    # the configuration says, without a warning.
    if config.hidden_act != "silu":
        problems.append(f"hidden_act {config.hidden_act}")
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        problems.append(f"rope_type {rope['rope_type']}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor {rope['partial_rotary_factor']}")
    # Mistral's window is the same in every layer: within it llama.cpp is exact, so it is a note (`notes_on`), not a
    # refusal.
    if config.model_type != "mistral" and "sliding_attention" in (getattr(config, "layer_types", None) or []):
        problems.append("sliding_attention layers")
    if getattr(config, "quantization_config", None) is not None:
        problems.append("quantized weights (write a 16-bit model first: qlora-neft merge)")
    if problems:
        raise UserInputError(f"{source}: cannot be written as GGUF here because of {', '.join(problems)}.")


def notes_on(architecture: Architecture) -> list[str]:
    """List where llama.cpp differs from transformers."""
    config = architecture.config
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    if window and window < config.max_position_embeddings:
        return [f"llama.cpp has no sliding window for this model: beyond {window} tokens it attends to all of them."]
    return []


def add_hyper_parameters(writer: GGUFWriter, architecture: Architecture) -> None:
    """Write shapes, norms and rotary frequencies into a GGUF's metadata."""
    config, rope = architecture.config, _rope(architecture.config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    # Llama 3.1's rule has no key: it is written as a tensor of divisors, see `rope_factors`.
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rope_factors(architecture: Architecture) -> torch.Tensor | None:
    """Return llama.cpp's divisors of the rotary frequencies, (head_dim / 2,); None to leave them unchanged.

    Llama 3.1's rule: long waves are stretched by ``factor``, short ones left alone, with a ramp in between. It is
    transformers' ``_compute_llama3_parameters`` as divisors.
    """
    rope = _rope(architecture.config)
    if rope["rope_type"] != "llama3":
        return None
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float64) / architecture.head_dim
    waves = 2 * math.pi * rope["rope_theta"] ** exponents  # tokens of a full turn
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    # Full turns within the context of pretraining: from `high` on a wave is known well, up to `low` it is stretched.
    turns = rope["original_max_position_embeddings"] / waves
    unstretched = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - unstretched) / rope["factor"] + unstretched)).float()


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **(config.rope_parameters or {})}
