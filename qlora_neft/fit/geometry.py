"""How many parameters and bytes a model takes once it is loaded in NF4, from its config.json alone.

Every count is exact: tests/integration/test_geometry.py compares each with the model that `load_nf4_base` loads. The
families of `families` are counted without torch; any other from transformers' own model on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..base.expert_names import is_of_stack
from ..errors import UserInputError, first_line
from ..files import read_json
from ..recipe.schema import Quantization
from .families import FAMILIES, Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        other_parameters: Norms, and biases: of quantized layers, which keep them unquantized, and of a tied head.
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
            return sum(linear.count * _lora_pair(linear, r) for linear in self.linears)
        # A list or an expression may name the head; "all-linear" leaves it alone.
        head = Linear(HEAD, self.vocab_size, self.embedding_width, False, 1)
        modules = [(name, linear) for linear in (*self.linears, head) for name in linear.module_names()]
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
        return sum(_lora_pair(linear, r) for name, linear in modules if any(match(t, name, linear) for t in targets))


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
    text = _text_config(config)
    # The text part of a multi-part model has a configuration of its own, but the quantization of the whole checkpoint
    # stands in the outer one.
    _check_stored_skips(config)
    # Counted by formula if the family is known, which needs no torch; else on transformers' own model, which takes
    # seconds.
    family = FAMILIES.get(text.get("model_type", ""))
    if text.get("mlp_only_layers"):  # blocks without experts, listed one by one
        family = None
    if family is None:
        return _count_skeleton(text)
    count, defaults = family
    keys = SimpleNamespace(**{key: _checked(key, text.get(key, d), d) for key, d in defaults.items()})
    parts = count(keys)
    tied, bias = keys.tie_word_embeddings, keys.vocab_size if parts.head_bias else 0
    token_embedding = keys.vocab_size * parts.embedding_width
    biases = sum(linear.count * linear.biases for linear in parts.linears)
    return Geometry(
        model_type=text["model_type"],
        hidden_size=keys.hidden_size,
        num_layers=keys.num_hidden_layers,
        num_attention_heads=keys.num_attention_heads,
        head_dim=parts.head_dim,
        intermediate_size=parts.inner or (keys.ffn_dim if text["model_type"] == "opt" else keys.intermediate_size),
        vocab_size=keys.vocab_size,
        max_position_embeddings=keys.max_position_embeddings,
        embedding_width=parts.embedding_width,
        tied=tied,
        linears=parts.linears,
        embedding_parameters=token_embedding + parts.positions,
        head_parameters=0 if tied else token_embedding + bias,
        other_parameters=parts.norms + biases + (bias if tied else 0),
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the decoder's own configuration.

    Raises:
        UserInputError: If the model also has an image or audio part that is loaded with it, and not counted here. Of
            most such models the text part alone is loaded, see `qlora_neft.base.text_part`.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    beside = sorted(key for key in ("audio_config", "vision_config") if config.get(key))
    if beside and not _is_loaded_alone(text):
        raise UserInputError(
            f"model.name_or_path: a model of type {config.get('model_type')!r} has a part that cannot be counted from "
            f"its config.json ({', '.join(beside)}). Supported: text-only models such as {', '.join(sorted(FAMILIES))}."
        )
    return text


def _is_loaded_alone(text: Mapping[str, Any]) -> bool:
    model_type = text.get("model_type")
    if model_type in FAMILIES:
        return True
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


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


def _count_skeleton(text: Mapping[str, Any]) -> Geometry:
    """Count a model that transformers builds on the meta device: any causal language model with attention heads.

    Raises:
        UserInputError: If transformers cannot build it, or it is not made of attention blocks.
    """
    model_type = str(text.get("model_type"))
    refusal = (
        f"model.name_or_path: a model of type {model_type!r} cannot be counted from its config.json. Supported: "
        f"causal language models with attention heads, such as {', '.join(sorted(FAMILIES))}."
    )
    import torch
    from torch import nn
    from transformers import CONFIG_MAPPING, AutoConfig

    from ..base.checkpoint import skeleton
    from ..base.nf4 import nf4_config
    from ..base.quantizer import in_nf4

    if model_type not in CONFIG_MAPPING:
        raise UserInputError(refusal)
    keys = {key: _number(value) for key, value in text.items() if key not in ("model_type", "quantization_config")}
    try:
        config = AutoConfig.for_model(model_type, **keys)
        heads, hidden = config.num_attention_heads, config.hidden_size
        model = skeleton(config)
        model.tie_weights()  # a tie is lost on the meta device, where each parameter is made anew
    except Exception as error:  # transformers checks a configuration's values, with errors of many kinds
        raise UserInputError(f"{refusal} ({first_line(error)})") from error
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert isinstance(embedding, nn.Parameter)  # (vocabulary, width)
    tied = head.weight is embedding
    head_parameters = 0 if tied else sum(parameter.numel() for parameter in head.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    # What is quantized is decided where the base is loaded, so it is done here, without weights.
    linears = _quantized_layers(in_nf4(model, nf4_config(Quantization(), torch.float32)))
    if not linears:
        raise UserInputError(refusal)
    quantized = sum(linear.weights for linear in linears)
    return Geometry(
        model_type=model_type,
        hidden_size=hidden,
        num_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        head_dim=_head_dim(config) or hidden // heads,
        intermediate_size=max(linear.used * max(linear.out_features, linear.in_features) for linear in linears),
        vocab_size=config.vocab_size,
        max_position_embeddings=getattr(config, "max_position_embeddings", None),
        embedding_width=embedding.shape[1],
        tied=tied,
        linears=tuple(linears),
        embedding_parameters=embedding.numel(),
        head_parameters=head_parameters,
        other_parameters=total - quantized - embedding.numel() - head_parameters,
    )


def _number(value: Any) -> Any:
    """Return a value of a configuration with the numbers that JSON lacks, which transformers writes as objects."""
    if isinstance(value, list | tuple):
        return [_number(one) for one in value]
    return float(value["__float__"]) if isinstance(value, dict) and value.keys() == {"__float__"} else value


def _head_dim(config: Any) -> int | None:
    """Return the width of a head, the largest where layers differ (gemma4)."""
    try:
        return getattr(config, "head_dim", None)
    except RuntimeError:  # transformers refuses to name one for all layers
        own = [config.per_layer_config[i].head_dim for i in range(config.num_hidden_layers)]
        return max(own, default=None)


def _quantized_layers(model: PreTrainedModel) -> list[Linear]:
    """Return what is in NF4 in a model that `in_nf4` has changed."""
    from bitsandbytes.nn import Linear4bit

    from ..base.experts import QuantizedExperts

    top_k = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    linears = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, Linear4bit):
            bias = module.bias is not None
            linears.append(Linear(last, module.out_features, module.in_features, bias, 1, name))
        elif isinstance(module, QuantizedExperts):
            for stack, (out, width) in module.matrix_shapes.items():
                sizes = (width, out) if module.layout.turned else (out, width)
                linears.append(
                    Linear(stack, *sizes, module.layout.has_bias, 1, f"{name}.{stack}", module.num_experts, top_k)
                )
    return linears
