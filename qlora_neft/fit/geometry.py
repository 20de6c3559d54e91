"""How many numbers and bytes a model takes once it is loaded in NF4, from its config.json alone. No torch.

Every count is exact: tests/integration/test_geometry.py compares each with the model that `load_nf4_base` loads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import UserInputError


@dataclass(frozen=True)
class Linear:
    """Linear layers of one name and shape.

    Attributes:
        name: Last component of the module's name, e.g. ``q_proj``.
        out_features, in_features: Rows and columns of the weight.
        bias: Whether there is one, of ``out_features`` numbers.
        count: How many the whole model has.
        path: Full name, with ``*`` for the number of the block; where empty, the name alone.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool
    count: int
    path: str = ""

    @property
    def weights(self) -> int:
        """Numbers in one weight, without the bias."""
        return self.out_features * self.in_features

    def module_names(self) -> Iterator[str]:
        """Full names of all of them, as ``named_modules`` gives them."""
        return ((self.path or self.name).replace("*", str(index)) for index in range(self.count))


@dataclass(frozen=True)
class Parts:
    """What one family adds to embedding, blocks and head.

    Attributes:
        linears: Layers that are quantized.
        norms: Numbers in all norms of the model.
        head_dim: Width of one attention head.
        embedding_width: Columns of the token embedding, and inputs of the head.
        positions: Numbers in learned positions.
        head_bias: Whether the head has a bias, which it keeps when its weight is tied.
    """

    linears: tuple[Linear, ...]
    norms: int
    head_dim: int
    embedding_width: int
    positions: int = 0
    head_bias: bool = False


def _in_blocks(
    keys: SimpleNamespace, prefix: str, shapes: dict[str, tuple[int, int]], biased: Mapping[str, bool] | bool
) -> tuple[Linear, ...]:
    """Layers that every block has once, from ``{"self_attn.q_proj": (out, in)}``."""
    return tuple(
        Linear(
            name=path.rsplit(".", 1)[-1],
            out_features=out,
            in_features=width,
            bias=biased if isinstance(biased, bool) else biased[path.split(".")[0]],
            count=keys.num_hidden_layers,
            path=f"{prefix}.*.{path}",
        )
        for path, (out, width) in shapes.items()
    )


def _attention(keys: SimpleNamespace, head_dim: int, output: str) -> dict[str, tuple[int, int]]:
    """Shapes of separate projections with grouped keys and values; an unsaid number of groups is one per head."""
    hidden, heads = keys.hidden_size, keys.num_attention_heads
    grouped = keys.num_key_value_heads or heads
    return {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (grouped * head_dim, hidden),
        "self_attn.v_proj": (grouped * head_dim, hidden),
        f"self_attn.{output}": (hidden, heads * head_dim),
    }


def _gated_mlp(keys: SimpleNamespace) -> dict[str, tuple[int, int]]:
    hidden, inner = keys.hidden_size, keys.intermediate_size
    return {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}


def _head_dim(keys: SimpleNamespace) -> int:
    return keys.head_dim or keys.hidden_size // keys.num_attention_heads


def _gated(
    keys: SimpleNamespace,
    *,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    norms_per_block: int = 2,
    head_norms: bool = False,
) -> Parts:
    """RMS norms, grouped attention, gated MLP: what Llama began. As it stands, Mistral, which reads no bias key."""
    head_dim = _head_dim(keys)
    shapes = {**_attention(keys, head_dim, "o_proj"), **_gated_mlp(keys)}
    linears = _in_blocks(keys, "model.layers", shapes, {"self_attn": attention_bias, "mlp": mlp_bias})
    block = norms_per_block * keys.hidden_size + (2 * head_dim if head_norms else 0)
    return Parts(linears, keys.num_hidden_layers * block + keys.hidden_size, head_dim, keys.hidden_size)


def _llama(keys: SimpleNamespace) -> Parts:
    return _gated(keys, attention_bias=keys.attention_bias, mlp_bias=keys.mlp_bias)


def _qwen2(keys: SimpleNamespace) -> Parts:
    """Llama with biases on queries, keys and values, none on the output."""
    parts = _gated(keys)
    biased = ("q_proj", "k_proj", "v_proj")
    return replace(parts, linears=tuple(replace(part, bias=part.name in biased) for part in parts.linears))


def _qwen3(keys: SimpleNamespace) -> Parts:
    """Llama with norms on queries and keys, shared by all heads."""
    return _gated(keys, attention_bias=keys.attention_bias, head_norms=True)


def _gemma2(keys: SimpleNamespace) -> Parts:
    """Llama with a norm before and after attention and MLP."""
    return _gated(keys, attention_bias=keys.attention_bias, norms_per_block=4)


def _gemma3(keys: SimpleNamespace) -> Parts:
    """Gemma 2 with norms on queries and keys."""
    return _gated(keys, attention_bias=keys.attention_bias, norms_per_block=4, head_norms=True)


def _opt(keys: SimpleNamespace) -> Parts:
    """Learned positions, layer norms with biases, and projections around the blocks where the embedding is narrower."""
    hidden, inner, blocks = keys.hidden_size, keys.ffn_dim, keys.num_hidden_layers
    width = keys.word_embed_proj_dim or hidden
    shapes = {f"self_attn.{name}": (hidden, hidden) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
    shapes |= {"fc1": (inner, hidden), "fc2": (hidden, inner)}
    linears = _in_blocks(keys, "model.decoder.layers", shapes, keys.enable_bias)
    if width != hidden:
        linears += (
            Linear("project_out", width, hidden, False, 1, "model.decoder.project_out"),
            Linear("project_in", hidden, width, False, 1, "model.decoder.project_in"),
        )
    last_norm = keys.do_layer_norm_before and not keys._remove_final_layer_norm
    norms = (2 * blocks + last_norm) * 2 * hidden if keys.layer_norm_elementwise_affine else 0
    # Two rows more than positions: the first two are for padding.
    positions = (keys.max_position_embeddings + 2) * hidden
    return Parts(linears, norms, hidden // keys.num_attention_heads, width, positions)


def _gpt_neox(keys: SimpleNamespace) -> Parts:
    """One fused projection for queries, keys and values; layer norms and MLP always with biases."""
    hidden, inner = keys.hidden_size, keys.intermediate_size
    shapes = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
    }
    linears = _in_blocks(keys, "gpt_neox.layers", shapes, {"attention": keys.attention_bias, "mlp": True})
    norms = (2 * keys.num_hidden_layers + 1) * 2 * hidden
    return Parts(linears, norms, hidden // keys.num_attention_heads, hidden)


def _phi(keys: SimpleNamespace) -> Parts:
    """Attention and MLP side by side behind one layer norm, biases everywhere, the head included."""
    hidden, inner = keys.hidden_size, keys.intermediate_size
    head_dim = _head_dim(keys)
    shapes = {**_attention(keys, head_dim, "dense"), "mlp.fc1": (inner, hidden), "mlp.fc2": (hidden, inner)}
    # The norms of queries and keys ignore a head_dim of the configuration.
    head_norms = 4 * (hidden // keys.num_attention_heads) if keys.qk_layernorm else 0
    norms = keys.num_hidden_layers * (2 * hidden + head_norms) + 2 * hidden
    return Parts(_in_blocks(keys, "model.layers", shapes, True), norms, head_dim, hidden, head_bias=True)


_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings".split()
)
_GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "attention_bias": False}


def _defaults(*sizes: int, **others: int | bool | None) -> dict[str, int | bool | None]:
    return {"tie_word_embeddings": False, **dict(zip(_SIZES, sizes, strict=True)), **others}


_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_QWEN = (151936, 4096, 22016, 32, 32, 32768)

# By model type: how its parts are counted, and what transformers takes for a key that the config.json leaves out.
FAMILIES: dict[str, tuple[Callable[[SimpleNamespace], Parts], dict[str, int | bool | None]]] = {
    "llama": (_llama, _defaults(32000, 4096, 11008, 32, 32, 2048, num_key_value_heads=None, head_dim=None, **_NO_BIAS)),
    "mistral": (_gated, _defaults(32000, 4096, 14336, 32, 32, 131072, num_key_value_heads=8, head_dim=None)),
    "qwen2": (_qwen2, _defaults(*_QWEN, num_key_value_heads=32, head_dim=None)),
    "qwen3": (_qwen3, _defaults(*_QWEN, num_key_value_heads=32, head_dim=128, attention_bias=False)),
    "gemma2": (_gemma2, _defaults(256000, 2304, 9216, 26, 8, 8192, **_GEMMA)),
    "gemma3_text": (_gemma3, _defaults(262208, 2304, 9216, 26, 8, 131072, **_GEMMA)),
    "gpt_neox": (_gpt_neox, _defaults(50432, 6144, 24576, 44, 64, 2048, attention_bias=True)),
    "phi": (
        _phi,
        _defaults(51200, 2048, 8192, 24, 32, 2048, num_key_value_heads=None, head_dim=None, qk_layernorm=False),
    ),
    "opt": (
        _opt,
        {
            "vocab_size": 50272,
            "hidden_size": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "word_embed_proj_dim": None,
            "tie_word_embeddings": True,
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
        },
    ),
}


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
