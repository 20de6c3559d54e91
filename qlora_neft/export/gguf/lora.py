"""An adapter as GGUF. llama.cpp scales every module by alpha / r; where PEFT does not, the difference goes into B."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ...adapter.folder import AdapterFolder, beyond_plain
from ...adapter.names import check_names
from ...adapter.weights import A, AdapterWeights, B
from ...errors import UserInputError
from ..inputs import refuse_links_of_adapter
from .architecture import Architecture, architecture_of, notes_on, read_model_config
from .file import GgufTensor, check_dtype, gguf_library, write_gguf

if TYPE_CHECKING:
    from gguf import GGUFWriter

MERGE = "Merge the adapter and write the merged model: qlora-neft merge, then qlora-neft gguf."
MERGE_WITH_PEFT = "Merge the adapter with PEFT's merge_and_unload and write the merged model: qlora-neft gguf."


def write_lora_gguf(folder: AdapterFolder, path: Path, dtype: str = "f32") -> list[str]:
    """Write an adapter as a LoRA GGUF.

    rsLoRA, ``alpha_pattern`` and ``rank_pattern`` are kept: the delta that llama.cpp adds is PEFT's.

    Args:
        folder: The adapter. Its base's configuration must be reachable, its base's weights need not.
        path: The file to write.
        dtype: ``f32`` (as trained), ``f16`` or ``bf16``.

    Returns:
        Differences between llama.cpp and PEFT; empty for most models.

    Raises:
        UserInputError: If llama.cpp has no place for a part of the adapter.
        RunFailed: If the disk fails.
    """
    gguf = gguf_library()
    # Dtype, library and architecture are checked before the weights are read.
    written = check_dtype(dtype)
    refuse_links_of_adapter(folder)
    check_names(folder)
    architecture = architecture_of(read_model_config(folder.base, folder.base_revision), folder.source)
    weights = _weights(folder, architecture)
    alpha = float(folder.config["lora_alpha"])
    if folder.config.get("use_rslora"):
        alpha *= math.sqrt(folder.config["r"])  # alpha / sqrt(r) is (alpha * sqrt(r)) / r
    name_of = architecture.namer()
    tensors = []
    for module, rank in sorted(weights.ranks.items()):
        key = f"{module}.weight"
        name = name_of(key)
        if name is None:
            raise UserInputError(f"{folder.source}: llama.cpp's {architecture.name} has no place for {module}. {MERGE}")
        a, b = weights.pair(module)
        # A file has one alpha, and llama.cpp divides it by each module's own rank. The factor is 1 unless a pattern or
        # rsLoRA with several ranks says otherwise; float32, so that it costs no precision.
        factor = weights.scale(module) / (alpha / rank)
        b = architecture.rows_for_llama_cpp(key, b.float() * factor)
        for end, tensor in (("lora_a", a), ("lora_b", b)):
            # The default argument binds this tensor; a plain closure would see the loop's last one.
            tensors.append(GgufTensor(f"{name}.{end}", tuple(tensor.shape), written, lambda tensor=tensor: tensor))

    def describe(writer: GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(folder.path.resolve().name)

    write_gguf(path, architecture.name, describe, tensors)
    return notes_on(architecture)


def _weights(folder: AdapterFolder, architecture: Architecture) -> AdapterWeights:
    """Return the adapter's weights if they are pairs of matrices only, and llama.cpp has a place for all of them."""
    beyond = beyond_plain(folder.config)
    used = [key for key in beyond if not key.startswith("bias=")]  # known by its weights, below
    remedy = MERGE_WITH_PEFT if beyond else MERGE
    if used:
        raise UserInputError(f"{folder.source}: llama.cpp has no place for {', '.join(used)} of the adapter. {remedy}")
    weights = AdapterWeights(folder)
    # Known by their names alone: bias, DoRA's magnitudes, whole modules and trained tokens.
    others = [key for key in weights.shapes if not key.endswith((A, B))]
    if others:
        raise UserInputError(
            f"{folder.source}: a LoRA GGUF holds the matrices A and B only, the adapter has {len(others)} other "
            f"weights, such as {others[0]}. {remedy}"
        )
    if architecture.is_tied and "lm_head" in weights.ranks:
        raise UserInputError(
            f"{folder.source}: has a LoRA on lm_head, which is the embedding in this base. llama.cpp cannot change one "
            "without the other, and they cannot be merged separately. Train without lm_head in lora.target_modules."
        )
    return weights
