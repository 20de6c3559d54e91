"""A merged or plain model as GGUF: weights, hyper-parameters, tokenizer, chat template."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ...base.config import load_tokenizer, read_config
from ...base.model_files import stored_tensors
from ...errors import UserInputError
from .file import GgufTensor, check_dtype, gguf_library, write_gguf
from .vocabulary import vocabulary_of

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
        name: llama.cpp's.
        config: transformers' configuration of the model.
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
        """Whether the head is the embedding."""
        return bool(self.config.tie_word_embeddings)

    def namer(self) -> Callable[[str], str | None]:
        """GGUF's name of a weight of transformers', None where llama.cpp has no place for it."""
        gguf = gguf_library()
        arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        names = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)
        return lambda key: names.get_name(key, try_suffixes=(".weight", ".bias"))

    def rows_for_llama_cpp(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A weight, bias or LoRA B with its rows where llama.cpp looks for them.

        transformers rotates the first half of a head against the second; llama.cpp's ``llama`` rotates neighbours, as
        Meta's checkpoints have it. So the rows of each head of q and k go from (2, half) to (half, 2). Its other
        architectures rotate as transformers does.
        """
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        num_heads = heads.get(key.split(".")[-2])
        if self.name != "llama" or num_heads is None:
            return tensor
        half = tensor.shape[0] // num_heads // 2
        return tensor.reshape(num_heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def architecture_of(config: Any, source: str) -> Architecture:
    """The architecture of a model, if it can be written.

    Args:
        config: transformers' configuration.
        source: What the caller named; for messages.

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
    """Refuse what the architecture's name does not say, and llama.cpp would leave out."""
    rope = _rope(config)
    problems = []
    if config.hidden_act != "silu":
        problems.append(f"hidden_act {config.hidden_act}")
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        problems.append(f"rope_type {rope['rope_type']}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor {rope['partial_rotary_factor']}")
    if config.model_type != "mistral" and "sliding_attention" in (getattr(config, "layer_types", None) or []):
        problems.append("sliding_attention layers")
    if getattr(config, "quantization_config", None) is not None:
        problems.append("quantized weights (write a 16-bit model first: qlora-neft merge)")
    if problems:
        raise UserInputError(f"{source}: cannot be written as GGUF here because of {', '.join(problems)}.")


def notes_on(architecture: Architecture) -> list[str]:
    """What llama.cpp does otherwise than transformers, in the reader's words."""
    config = architecture.config
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    if window and window < config.max_position_embeddings:
        return [f"llama.cpp has no sliding window for this model: beyond {window} tokens it attends to all of them."]
    return []


def add_hyper_parameters(writer: GGUFWriter, architecture: Architecture) -> None:
    """Shapes, norms and rotary frequencies."""
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
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rope_factors(architecture: Architecture) -> torch.Tensor | None:
    """What llama.cpp divides each rotary frequency by, (head_dim / 2,); None for nothing.

    Llama 3.1's rule: long waves are stretched by ``factor``, short ones left alone, with a ramp in between.
    """
    rope = _rope(architecture.config)
    if rope["rope_type"] != "llama3":
        return None
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float64) / architecture.head_dim
    waves = 2 * math.pi * rope["rope_theta"] ** exponents  # tokens of a full turn
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / waves
    unstretched = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - unstretched) / rope["factor"] + unstretched)).float()


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **(config.rope_parameters or {})}


_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}


def write_model_gguf(model_dir: Path, path: Path, dtype: str = "f16") -> list[str]:
    """Write a model's folder as GGUF.

    Args:
        model_dir: Folder with ``config.json``, safetensors and a tokenizer; not quantized.
        path: The file to write.
        dtype: Of matrices: ``f16``, ``bf16`` or ``f32``. Norms and biases are in f32.

    Returns:
        What llama.cpp will do otherwise than transformers; nothing for most models.

    Raises:
        UserInputError: If the model cannot be written exactly, or ``path`` not at all.
        RunFailed: If the disk fails.
    """
    gguf_library()
    matrices = check_dtype(dtype)
    config = read_model_config(str(model_dir))
    architecture = architecture_of(config, str(model_dir))
    vocabulary = vocabulary_of(load_tokenizer(str(model_dir)), config.vocab_size, str(model_dir))
    tensors = list(_tensors(architecture, model_dir, matrices))

    def describe(writer: Any) -> None:
        writer.add_type("model")
        writer.add_name(model_dir.resolve().name)
        writer.add_file_type(gguf_library().LlamaFileType[_FILE_TYPES[dtype]])
        add_hyper_parameters(writer, architecture)
        vocabulary.add_to(writer)
        _add_end_of_turn(writer, model_dir, vocabulary.eos)

    write_gguf(path, architecture.name, describe, tensors)
    return [*notes_on(architecture), *vocabulary.notes]


def read_model_config(name_or_path: str, revision: str | None = None) -> Any:
    """transformers' configuration of a model.

    Raises:
        UserInputError: If there is none.
    """
    refusal = (
        f"{name_or_path}: no model configuration can be read. Give a folder with a config.json, or a base that you can "
        "reach with --base."
    )
    return read_config(name_or_path, refusal, revision=revision)


def _add_end_of_turn(writer: Any, model_dir: Path, eos: int) -> None:
    """A second token that ends a response, where the model's generation config lists one."""
    path = model_dir / "generation_config.json"
    stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    others = [token for token in stated if token != eos] if isinstance(stated, list) else []
    if others:
        writer.add_eot_token_id(others[0])


def _tensors(architecture: Architecture, model_dir: Path, matrices: torch.dtype) -> Iterator[GgufTensor]:
    name_of = architecture.namer()
    factors = rope_factors(architecture)
    if factors is not None:
        yield GgufTensor("rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: factors)
    found = set()
    for file, key, shape in _stored(model_dir):
        if key.endswith("rotary_emb.inv_freq") or (architecture.is_tied and key == "lm_head.weight"):
            continue
        name = name_of(key)
        if name is None:
            raise UserInputError(f"{model_dir}: llama.cpp's {architecture.name} has no place for the weight {key}.")
        found.add(key)
        dtype = torch.float32 if len(shape) == 1 else matrices
        yield GgufTensor(name, shape, dtype, partial(_read, architecture, file, key))
    if "model.embed_tokens.weight" not in found or not (architecture.is_tied or "lm_head.weight" in found):
        raise UserInputError(f"{model_dir}: its safetensors lack the embedding or the head. The model must be whole.")


def _read(architecture: Architecture, file: Path, key: str) -> torch.Tensor:
    with safe_open(file, "pt") as stored:
        return architecture.rows_for_llama_cpp(key, stored.get_tensor(key))


def _stored(model_dir: Path) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    """File, name and shape of every weight."""
    files = sorted(model_dir.glob("model*.safetensors"))
    if not files:
        raise UserInputError(f"{model_dir}: holds no model*.safetensors. Give the folder that merge wrote.")
    for file in files:
        try:
            for key, tensor in stored_tensors(file).items():
                yield file, key, tensor.shape
        except SafetensorError as error:
            raise UserInputError(f"{file}: cannot be read ({error}).") from error
