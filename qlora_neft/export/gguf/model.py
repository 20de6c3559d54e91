"""A merged or plain model as GGUF: weights, hyper-parameters, tokenizer, chat template."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from ...base.config import load_tokenizer
from ...base.model_files import same_tensor, stored_tensors
from ...errors import UserInputError
from ...files import read_json
from ..inputs import OF_MODEL, refuse_links
from .architecture import Architecture, add_hyper_parameters, architecture_of, notes_on, read_model_config, rope_factors
from .file import GgufTensor, check_dtype, gguf_library, write_gguf
from .vocabulary import vocabulary_of

if TYPE_CHECKING:
    from gguf import GGUFWriter

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}  # names of LlamaFileType


def write_model_gguf(model_dir: Path, path: Path, dtype: str = "f16") -> list[str]:
    """Write a model's folder as GGUF.

    Args:
        model_dir: Folder with ``config.json``, safetensors and a tokenizer; not quantized.
        path: The file to write.
        dtype: Dtype of matrices: ``f16``, ``bf16`` or ``f32``. Norms and biases are in f32.

    Returns:
        Differences between llama.cpp and transformers; empty for most models.

    Raises:
        UserInputError: If the model cannot be written exactly, or ``path`` cannot be written.
        RunFailed: If the disk fails.
    """
    gguf_library()
    matrices = check_dtype(dtype)
    refuse_links(str(model_dir), model_dir, OF_MODEL)
    config = read_model_config(str(model_dir))
    architecture = architecture_of(config, str(model_dir))
    # The tokenizer may be refused, so it is read before any weight.
    vocabulary = vocabulary_of(load_tokenizer(str(model_dir)), config.vocab_size, str(model_dir))
    tensors = list(_tensors(architecture, model_dir, matrices))

    def describe(writer: GGUFWriter) -> None:
        writer.add_type("model")
        writer.add_name(model_dir.resolve().name)
        writer.add_file_type(gguf_library().LlamaFileType[_FILE_TYPES[dtype]])
        add_hyper_parameters(writer, architecture)
        vocabulary.add_to(writer)
        _add_end_of_turn(writer, model_dir, vocabulary.eos)

    write_gguf(path, architecture.name, describe, tensors)
    return [*notes_on(architecture), *vocabulary.notes]


def _add_end_of_turn(writer: GGUFWriter, model_dir: Path, eos: int) -> None:
    """Add a second token that ends a response, if the model's generation config lists one."""
    path = model_dir / "generation_config.json"
    stated = read_json(path).get("eos_token_id") if path.is_file() else None
    # GGUF has room for one more; the instruction models of Llama 3 and Qwen list two or three.
    others = [token for token in stated if token != eos] if isinstance(stated, list) else []
    if others:
        writer.add_eot_token_id(others[0])


def _tensors(architecture: Architecture, model_dir: Path, matrices: torch.dtype) -> Iterator[GgufTensor]:
    name_of = architecture.namer()
    factors = rope_factors(architecture)
    if factors is not None:
        yield GgufTensor("rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: factors)
    found, own_head = set(), _has_own_head(model_dir)
    for file, key, shape in _stored(model_dir):
        # Old checkpoints store the rotary frequencies, which follow from the configuration; for a tied head llama.cpp
        # takes the embedding. A head that the configuration calls tied and that differs is the model's own, as for
        # transformers.
        tied = architecture.is_tied and not own_head
        if key.endswith("rotary_emb.inv_freq") or (tied and key == "lm_head.weight"):
            continue
        name = name_of(key)
        if name is None:
            raise UserInputError(f"{model_dir}: llama.cpp's {architecture.name} has no place for the weight {key}.")
        found.add(key)
        # Norms and biases stay in float32, as llama.cpp's own converter writes them: small, and its kernels expect it.
        dtype = torch.float32 if len(shape) == 1 else matrices
        yield GgufTensor(name, shape, dtype, partial(_read, architecture, file, key))
    if "model.embed_tokens.weight" not in found or not (architecture.is_tied or "lm_head.weight" in found):
        raise UserInputError(f"{model_dir}: its safetensors lack the embedding or the head. The model must be whole.")


def _has_own_head(model_dir: Path) -> bool:
    """Whether the files hold a head that is not the embedding once more."""
    place = {key: file for file, key, _ in _stored(model_dir) if key in (EMBEDDING, HEAD)}
    return len(place) == 2 and not same_tensor(place[EMBEDDING], EMBEDDING, place[HEAD], HEAD)


def _read(architecture: Architecture, file: Path, key: str) -> torch.Tensor:
    # Opened anew for each tensor: one is in memory at a time, however large the file.
    with safe_open(file, "pt") as stored:
        return architecture.rows_for_llama_cpp(key, stored.get_tensor(key))


def _stored(model_dir: Path) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    """Yield file, name and shape of every weight."""
    files = sorted(model_dir.glob("model*.safetensors"))
    if not files:
        raise UserInputError(f"{model_dir}: holds no model*.safetensors. Give the folder that merge wrote.")
    for file in files:
        try:
            for key, tensor in stored_tensors(file).items():
                yield file, key, tensor.shape
        except SafetensorError as error:
            raise UserInputError(f"{file}: cannot be read ({error}).") from error
