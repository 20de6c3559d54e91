"""How many parameters and bytes a model takes once it is loaded in NF4, from its config.json alone.

Every count is exact: tests/integration/test_geometry.py compares each with the model that `load_nf4_base` loads. The
families of `families` are counted without torch; any other from transformers' own model on the meta device, see
`skeleton`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..base.expert_names import is_of_stack
from ..base.flattening import why_padded
from ..errors import UserInputError
from ..files import read_json
from .families import FAMILIES, TEXT_PARTS, Linear

__all__ = ["FAMILIES", "Geometry", "Linear", "geometry_of", "shipped_config"]

SECOND_BLOCK = 256  # absmax values per block of the second quantization, fixed in bitsandbytes
FLOAT32 = 4  # bytes
HEAD = "lm_head"  # in every family counted here
# Modules of multi-part models, which quantized checkpoints list although the text model alone has none of them.
NOT_IN_A_DECODER = {HEAD, "embed_out", "multi_modal_projector", "merger", "modality_projection"}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a causal language model. Counts are of parameters unless they say bytes.

    Attributes:
        model_type: As in config.json.
        hidden_size, num_layers, num_attention_heads, head_dim, vocab_size: As in config.json, or as derived from it.
        intermediate_size: Inner width of the MLP.
        max_position_embeddings: Context in tokens.
        embedding_width: Columns of the token embedding; differs from ``hidden_size`` in some OPT models.
        tied: Whether the head shares its weight with the embedding.
        linears: The layers that become ``Linear4bit``; the head is not among them.
        embedding_parameters: Token embedding, and learned positions.
        head_parameters: Untied output layer with its bias, else 0.
        other_parameters: Norms, and biases: of quantized layers, which keep them unquantized, and of a tied head; what
            else is not in NF4.
        other_linears: Linear layers among those: routers, and what the loader leaves out. Where the family is known,
            routers are only counted.
        float32_in_bfloat16, float32_in_float16: How many of the parameters that are not in NF4 stay in float32 where
            the others are in this dtype.
        left_out: Parts of the checkpoint that are not loaded, such as ``vision_config``.
        padded: Why its rows must be padded; "" if they may be flattened.
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
    other_linears: tuple[Linear, ...] = ()
    float32_in_bfloat16: int = 0
    float32_in_float16: int = 0
    left_out: tuple[str, ...] = ()
    padded: str = ""

    def parameters(self) -> int:
        """Return the size of the unquantized model, a tied weight counted once."""
        return self.quantized_parameters() + self.unquantized_parameters()

    def quantized_parameters(self) -> int:
        """Return the number of weights in ``Linear4bit``."""
        return sum(linear.count * linear.weights for linear in self.linears)

    def active_parameters(self) -> int:
        """Return the number of weights in NF4 that one token passes through: of experts, those it is sent to."""
        return sum(linear.count * linear.used * linear.matrix for linear in self.linears)

    def unquantized_parameters(self) -> int:
        """Return the number of all others: embeddings, head, norms and biases."""
        return self.embedding_parameters + self.head_parameters + self.other_parameters

    def nf4_bytes(self, double_quant: bool = True, block_size: int = 64) -> int:
        """Return the bytes of all quantized weights, as bitsandbytes holds them.

        Counted per weight: the packed ``data``, ``quant_state.absmax`` and, with double quantization,
        ``quant_state.state2.absmax`` and ``quant_state.offset``. Not counted: the tables of code values (64 bytes and
        1 KiB), which are constants, and biases, which are not quantized.

        Args:
            double_quant: Whether absmax is quantized to 8 bits again.
            block_size: Number of weights that share one absmax.
        """
        return sum(
            linear.count * linear.experts * _nf4_bytes(linear.matrix, double_quant, block_size)
            for linear in self.linears
        )

    def lora_parameters(self, r: int, target_modules: str | Sequence[str] = "all-linear") -> int:
        """Return the size of the adapters that PEFT adds: ``r * (in + out)`` for every layer it matches.

        Args:
            r: Rank.
            target_modules: ``"all-linear"``, which excludes the head; a list of names, each matching every layer
                whose full name is or ends with it; or any other string as a regular expression for the full name.

        Raises:
            UserInputError: If a target matches no linear layer.
        """
        if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
            taken = [linear for linear in (*self.linears, *self.other_linears) if linear.adapted]
            return sum(linear.count * _lora_pair(linear, r) for linear in taken)
        # A list or an expression may name the head; "all-linear" leaves it alone.
        head = Linear(HEAD, self.vocab_size, self.embedding_width, False, 1)
        layers = (*self.linears, *self.other_linears, head)
        modules = [(name, linear) for linear in layers for name in linear.module_names()]
        targets = [target_modules] if isinstance(target_modules, str) else list(dict.fromkeys(target_modules))
        # PEFT's rule: an expression must match the whole name, an entry of a list its last parts.
        match = _is_matched if isinstance(target_modules, str) else _is_named
        unknown = sorted(target for target in targets if not any(match(target, *module) for module in modules))
        if unknown:
            known = ", ".join(sorted({linear.name for _, linear in modules}))
            raise UserInputError(
                f"lora.target_modules: the model has no linear layer {', '.join(unknown)}. Its linear layers are "
                f"{known}; all-linear takes all but the head."
            )
        matched = [(name, linear) for name, linear in modules if any(match(t, name, linear) for t in targets)]
        for name, linear in matched:
            if linear.refused:
                raise UserInputError(
                    f"lora.target_modules: {name} cannot have LoRA ({linear.refused}). Remove it, or write all-linear, "
                    "which leaves it out."
                )
        return sum(_lora_pair(linear, r) for _, linear in matched)


def _nf4_bytes(weights: int, double_quant: bool, block_size: int) -> int:
    """Return the bytes of one weight: blocks do not span layers, and the last one of each may be short."""
    # Two weights share a byte; -(-a // b) rounds up.
    packed = -(-weights // 2)
    blocks = -(-weights // block_size)
    if not double_quant:
        return packed + FLOAT32 * blocks
    # A byte for each absmax, a float32 for every 256 of them, and one float32 for their mean, which is subtracted
    # first.
    return packed + blocks + FLOAT32 * -(-blocks // SECOND_BLOCK) + FLOAT32


def _lora_pair(linear: Linear, r: int) -> int:
    return linear.experts * r * (linear.in_features + linear.out_features)


def _is_named(target: str, module: str, linear: Linear) -> bool:
    """Whether an entry of a list of targets is this module; of experts, also by the projections in their weights."""
    if linear.experts > 1 and is_of_stack(linear.name, [target]):
        return True
    return module == target or module.endswith(f".{target}")


def _is_matched(target: str, module: str, linear: Linear) -> bool:
    """Whether a regular expression matches this module; experts are no modules to PEFT."""
    return linear.experts == 1 and re.fullmatch(target, module) is not None


# ---- From a configuration ----


def shipped_config(name: str) -> dict[str, Any] | None:
    """Return the keys that matter of a well-known base, by its Hub id, or None. For planning without a download."""
    path = Path(__file__).with_name("base_configs.json")
    return read_json(path).get(name)


def geometry_of(config: Mapping[str, Any]) -> Geometry:
    """Count a model's parameters.

    Args:
        config: Content of its ``config.json``; keys it leaves out have transformers' defaults.

    Raises:
        UserInputError: If the model type cannot be counted, a key that matters has no usable value, or the checkpoint
            is stored with layers left unquantized.
    """
    # The quantization of a whole checkpoint stands in its outer configuration.
    _check_stored_skips(config)
    others = _parts_beside_text(config)
    text = config.get("text_config")
    # Of a checkpoint with more parts the text part is loaded: of the families that are known, the formula counts it.
    is_known = isinstance(text, Mapping) and text.get("model_type") == TEXT_PARTS.get(config.get("model_type", ""))
    if is_known or not others:
        config = text or config
        return replace(_counted(config), left_out=tuple(sorted(others)), padded=why_padded(config))
    return replace(_counted(config), padded=why_padded(config))


def _counted(config: Mapping[str, Any]) -> Geometry:
    # Counted by formula if the family is known, which needs no torch; else on transformers' own model, which takes
    # seconds. How a model with more parts is loaded, only its classes say.
    family = None if "text_config" in config else FAMILIES.get(config.get("model_type", ""))
    if family is None or config.get("mlp_only_layers"):  # blocks without experts, one by one
        return _of_skeleton(config)
    count, defaults = family
    keys = SimpleNamespace(**{key: _checked(key, config.get(key, d), d) for key, d in defaults.items()})
    parts = count(keys)
    tied, bias = keys.tie_word_embeddings, keys.vocab_size if parts.head_bias else 0
    token_embedding = keys.vocab_size * parts.embedding_width
    biases = sum(linear.count * linear.biases for linear in parts.linears)
    return Geometry(
        model_type=config["model_type"],
        hidden_size=keys.hidden_size,
        num_layers=keys.num_hidden_layers,
        num_attention_heads=keys.num_attention_heads,
        head_dim=parts.head_dim,
        intermediate_size=parts.inner or (keys.ffn_dim if config["model_type"] == "opt" else keys.intermediate_size),
        vocab_size=keys.vocab_size,
        max_position_embeddings=keys.max_position_embeddings,
        embedding_width=parts.embedding_width,
        tied=tied,
        linears=parts.linears,
        embedding_parameters=token_embedding + parts.positions,
        head_parameters=0 if tied else token_embedding + bias,
        other_parameters=parts.norms + biases + (bias if tied else 0),
        float32_in_float16=parts.kept_in_float16,
    )


def _parts_beside_text(config: Mapping[str, Any]) -> list[str]:
    parts = [key for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    return [key for key in parts if key not in ("text_config", "quantization_config")]


def _of_skeleton(config: Mapping[str, Any]) -> Geometry:
    from .skeleton import counts_of

    return Geometry(**counts_of(config))


def _check_stored_skips(config: Mapping[str, Any]) -> None:
    """Refuse checkpoints stored in NF4 with layers of the blocks left unquantized, or with the head quantized."""
    stored = config.get("quantization_config")
    skipped = stored.get("llm_int8_skip_modules") if isinstance(stored, Mapping) else None
    # transformers skips the head by itself; a list that names only the head, or parts this model lacks, changes
    # nothing.
    if skipped is None or (HEAD in skipped and NOT_IN_A_DECODER.issuperset(skipped)):
        return
    raise UserInputError(
        "model.name_or_path: the checkpoint is stored with its own choice of quantized layers "
        f"(llm_int8_skip_modules {', '.join(map(str, skipped)) or 'empty'}), which cannot be counted. "
        "Start from the original 16-bit checkpoint."
    )


def _checked(key: str, value: Any, default: int | bool | None) -> Any:
    """Return a key's value.

    Raises:
        UserInputError: If it is not of the kind that its default has.
    """
    if isinstance(default, bool):
        fits, rule = isinstance(value, bool), "true or false"
    else:
        is_unset = value is None and (default is None or key == "num_key_value_heads")
        is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        fits, rule = is_unset or is_size, "a whole number of at least 1"
    if not fits:
        raise UserInputError(f"model.name_or_path: {key} in its config.json must be {rule}, got {value!r}.")
    return value
