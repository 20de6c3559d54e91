"""How many numbers and bytes a model takes once it is loaded in NF4, from its config.json alone. No torch.

Every count is exact: tests/integration/test_geometry.py compares each with the model that `load_nf4_base` loads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import UserInputError
from .architectures import FAMILIES, Linear

__all__ = ["Geometry", "Linear", "geometry_of", "shipped_config"]

SECOND_BLOCK = 256  # absmax values to a block of the second quantization, fixed in bitsandbytes
FLOAT32 = 4  # bytes
HEAD = "lm_head"  # of every supported model
# Modules of models of several parts, which quantized checkpoints list although the text model alone has none of them.
NOT_IN_A_DECODER = {HEAD, "embed_out", "multi_modal_projector", "merger", "modality_projection"}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a causal language model. Counts are of numbers unless they say bytes.

    Attributes:
        model_type: As in config.json.
        hidden_size, num_layers, num_attention_heads, head_dim, vocab_size: As in config.json, or as derived there.
        intermediate_size: Inner width of the MLP.
        max_position_embeddings: Context in tokens.
        embedding_width: Columns of the token embedding; differs from ``hidden_size`` in some OPT models.
        tied: Whether the head shares its weight with the embedding.
        linears: The layers that become ``Linear4bit``; the head is none of them.
        embedding_parameters: Token embedding, and learned positions.
        head_parameters: Untied output layer with its bias, else 0.
        other_parameters: Norms, and biases: of quantized layers, which keep them as they are, and of a tied head.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int | None
    embedding_width: int
    tied: bool
    linears: tuple[Linear, ...]
    embedding_parameters: int
    head_parameters: int
    other_parameters: int

    def parameters(self) -> int:
        """Of the unquantized model, a tied weight counted once."""
        return self.quantized_parameters() + self.unquantized_parameters()

    def quantized_parameters(self) -> int:
        """Weights in ``Linear4bit``."""
        return sum(linear.count * linear.weights for linear in self.linears)

    def unquantized_parameters(self) -> int:
        """Everything else: embeddings, head, norms and biases."""
        return self.embedding_parameters + self.head_parameters + self.other_parameters

    def nf4_bytes(self, double_quant: bool = True, block_size: int = 64) -> int:
        """Bytes of all quantized weights, as bitsandbytes holds them.

        Counted per weight: the packed ``data``, ``quant_state.absmax`` and, with double quantization,
        ``quant_state.state2.absmax`` and ``quant_state.offset``. Not counted: the tables of code values (64 bytes and
        1 KiB), which are constants, and biases, which are not quantized.

        Args:
            double_quant: Whether absmax is quantized to 8 bits again.
            block_size: Weights that share one absmax.
        """
        return sum(linear.count * _nf4_bytes(linear.weights, double_quant, block_size) for linear in self.linears)

    def lora_parameters(self, r: int, target_modules: str | Sequence[str] = "all-linear") -> int:
        """Numbers in the adapters that PEFT adds: ``r * (in + out)`` for every layer it matches.

        Args:
            r: Rank.
            target_modules: ``"all-linear"``, which leaves out the head; a list of names, each matching every layer
                whose full name is or ends with it; or any other string as a regular expression for the full name.

        Raises:
            UserInputError: If a target matches no linear layer.
        """
        if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
            return sum(linear.count * _pair(linear, r) for linear in self.linears)
        head = Linear(HEAD, self.vocab_size, self.embedding_width, False, 1)
        modules = [(name, linear) for linear in (*self.linears, head) for name in linear.module_names()]
        targets = [target_modules] if isinstance(target_modules, str) else list(dict.fromkeys(target_modules))
        match = re.fullmatch if isinstance(target_modules, str) else _names
        unknown = sorted(target for target in targets if not any(match(target, name) for name, _ in modules))
        if unknown:
            known = ", ".join(sorted({linear.name for _, linear in modules}))
            raise UserInputError(
                f"lora.target_modules: the model has no linear layer {', '.join(unknown)}. Its linear layers are "
                f"{known}; all-linear takes all but the head."
            )
        return sum(_pair(linear, r) for name, linear in modules if any(match(target, name) for target in targets))


def geometry_of(config: Mapping[str, Any]) -> Geometry:
    """Count a model from the content of its config.json.

    Args:
        config: The content; that of a ``text_config`` in it counts for the whole. A missing key has the value that
            transformers gives it for this model type.

    Raises:
        UserInputError: If the model type is not supported, the model has parts besides the decoder, a key has no
            usable value, or the checkpoint is stored with layers left unquantized.
    """
    text = _text_config(config)
    model_type = text.get("model_type")
    if model_type not in FAMILIES:
        raise UserInputError(
            f"model.name_or_path: a model of type {model_type!r} cannot be counted from its config.json. "
            f"Supported: {', '.join(sorted(FAMILIES))}."
        )
    _check_stored_skips(config)
    count, defaults = FAMILIES[model_type]
    keys = SimpleNamespace(**{key: _checked(key, text.get(key, d), d) for key, d in defaults.items()})
    parts = count(keys)
    tied, bias = keys.tie_word_embeddings, keys.vocab_size if parts.head_bias else 0
    token_embedding = keys.vocab_size * parts.embedding_width
    biases = sum(linear.count * linear.out_features for linear in parts.linears if linear.bias)
    return Geometry(
        model_type=model_type,
        hidden_size=keys.hidden_size,
        num_layers=keys.num_hidden_layers,
        num_attention_heads=keys.num_attention_heads,
        head_dim=parts.head_dim,
        intermediate_size=keys.ffn_dim if model_type == "opt" else keys.intermediate_size,
        vocab_size=keys.vocab_size,
        max_position_embeddings=keys.max_position_embeddings,
        embedding_width=parts.embedding_width,
        tied=tied,
        linears=parts.linears,
        embedding_parameters=token_embedding + parts.positions,
        head_parameters=0 if tied else token_embedding + bias,
        other_parameters=parts.norms + biases + (bias if tied else 0),
    )


def shipped_config(name: str) -> dict[str, Any] | None:
    """The keys that count of a well-known base, by its Hub id, or None. For planning without a download."""
    path = Path(__file__).with_name("base_configs.json")
    return json.loads(path.read_text(encoding="utf-8")).get(name)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's own configuration.

    Raises:
        UserInputError: If an image or audio part stands beside it: its linear layers would be quantized and adapted
            as well, and counted nowhere.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    beside = sorted(key for key in ("audio_config", "vision_config") if config.get(key))
    if beside:
        raise UserInputError(
            f"model.name_or_path: a model of type {config.get('model_type')!r} has a part that cannot be counted from "
            f"its config.json ({', '.join(beside)}). Supported: text-only {', '.join(sorted(FAMILIES))}."
        )
    return text


def _check_stored_skips(config: Mapping[str, Any]) -> None:
    """Refuse checkpoints stored in NF4 with some layers of the blocks left out, or the head not left out."""
    stored = config.get("quantization_config")
    skipped = stored.get("llm_int8_skip_modules") if isinstance(stored, Mapping) else None
    if skipped is None or (HEAD in skipped and NOT_IN_A_DECODER.issuperset(skipped)):
        return
    raise UserInputError(
        "model.name_or_path: the checkpoint is stored with its own choice of quantized layers "
        f"(llm_int8_skip_modules {', '.join(map(str, skipped)) or 'empty'}), which cannot be counted. "
        "Start from the original 16-bit checkpoint."
    )


def _checked(key: str, value: Any, default: int | bool | None) -> Any:
    """A key's value, of the kind that its default has.

    Raises:
        UserInputError: If it is of another kind.
    """
    if isinstance(default, bool):
        fits, rule = isinstance(value, bool), "true or false"
    else:
        unsaid = value is None and (default is None or key == "num_key_value_heads")
        is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        fits, rule = unsaid or is_size, "a whole number of at least 1"
    if not fits:
        raise UserInputError(f"model.name_or_path: {key} in its config.json must be {rule}, got {value!r}.")
    return value


def _nf4_bytes(weights: int, double_quant: bool, block_size: int) -> int:
    """Of one weight: blocks do not cross layers, and the last of each may be short."""
    packed = -(-weights // 2)
    blocks = -(-weights // block_size)
    if not double_quant:
        return packed + FLOAT32 * blocks
    return packed + blocks + FLOAT32 * -(-blocks // SECOND_BLOCK) + FLOAT32


def _pair(linear: Linear, r: int) -> int:
    return r * (linear.in_features + linear.out_features)


def _names(target: str, module: str) -> bool:
    """Whether PEFT takes the entry of a list of targets for this module."""
    return module == target or module.endswith(f".{target}")
