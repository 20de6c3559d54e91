"""The parts of each model family: its linear layers and other sizes, from the keys of its config.json. No torch.

One function counts each family; `FAMILIES` names it, and the values transformers takes for keys that are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace


@dataclass(frozen=True)
class Linear:
    """Linear layers of one name and shape.

    Attributes:
        name: Last component of the module's name, such as ``q_proj``.
        out_features, in_features: Rows and columns of the weight.
        bias: Whether there is one, of ``out_features`` numbers.
        count: Number of such layers in the whole model.
        experts: Weights of one layer: of fused experts, how many each layer has, else 1.
        used: How many of them a token passes through.
        path: Full name, with ``*`` for the number of the block; if empty, the name alone.
        adapted: Whether "all-linear" puts LoRA on it; routers are adapted only if they are named.
        refused: Why it cannot have LoRA, empty if it can.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool
    count: int
    path: str = ""
    experts: int = 1
    used: int = 1
    adapted: bool = True
    refused: str = ""

    @property
    def matrix(self) -> int:
        """Number of parameters of one weight: of one expert, or of the layer."""
        return self.out_features * self.in_features

    @property
    def weights(self) -> int:
        """Number of parameters of one layer, without the bias."""
        return self.experts * self.matrix

    @property
    def biases(self) -> int:
        """Number of parameters of one layer's bias."""
        return self.experts * self.out_features if self.bias else 0

    def module_names(self) -> Iterator[str]:
        """Yield the full name of each layer, as in ``named_modules``."""
        return ((self.path or self.name).replace("*", str(index)) for index in range(self.count))


@dataclass(frozen=True)
class Parts:
    """The parts of a model, besides the token embedding and the head, whose sizes depend on its family.

    Attributes:
        linears: Layers that are quantized.
        norms: Number of parameters of all norms of the model, and of its routers.
        inner: Width of a token's way through the MLP, None for ``intermediate_size``.
        kept_in_float16: Number of the parameters that stay in float32 where the others are in float16.
        head_dim: Width of one attention head.
        embedding_width: Columns of the token embedding, and inputs of the head.
        positions: Number of parameters of learned positions.
        head_bias: Whether the head has a bias, which it keeps when its weight is tied.
    """

    linears: tuple[Linear, ...]
    norms: int
    head_dim: int
    embedding_width: int
    positions: int = 0
    head_bias: bool = False
    inner: int | None = None
    kept_in_float16: int = 0


def _in_blocks(
    keys: SimpleNamespace, prefix: str, shapes: dict[str, tuple[int, int]], biased: Mapping[str, bool] | bool
) -> tuple[Linear, ...]:
    """Return the layers that every block has once, from ``{"self_attn.q_proj": (out, in)}``."""
    return tuple(
        Linear(
            name=path.rsplit(".", 1)[-1],
            out_features=out,
            in_features=width,
            # Configurations switch the biases of "self_attn" and "mlp" as a whole.
            bias=biased if isinstance(biased, bool) else biased[path.split(".")[0]],
            count=keys.num_hidden_layers,
            path=f"{prefix}.*.{path}",
        )
        for path, (out, width) in shapes.items()
    )


def _attention(keys: SimpleNamespace, head_dim: int, output: str) -> dict[str, tuple[int, int]]:
    """Return the shapes of separate projections; if the number of groups of keys and values is unset, one per head."""
    hidden, heads = keys.hidden_size, keys.num_attention_heads
    # (out, in) each. With grouped-query attention, several heads of queries share one of keys and values.
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
    """RMS norms, grouped attention, gated MLP, as in Llama; with the defaults Mistral, which reads no bias key."""
    head_dim = _head_dim(keys)
    shapes = {**_attention(keys, head_dim, "o_proj"), **_gated_mlp(keys)}
    linears = _in_blocks(keys, "model.layers", shapes, {"self_attn": attention_bias, "mlp": mlp_bias})
    # RMS norms have a weight and no bias. The norms of queries and keys have the width of one head, which all heads
    # share. One more norm follows the blocks.
    block = norms_per_block * keys.hidden_size + (2 * head_dim if head_norms else 0)
    return Parts(linears, keys.num_hidden_layers * block + keys.hidden_size, head_dim, keys.hidden_size)


def _llama(keys: SimpleNamespace) -> Parts:
    return _gated(keys, attention_bias=keys.attention_bias, mlp_bias=keys.mlp_bias)


def _qwen2(keys: SimpleNamespace) -> Parts:
    """Llama with biases on queries, keys and values, but none on the output."""
    parts = _gated(keys)
    biased = ("q_proj", "k_proj", "v_proj")
    return replace(parts, linears=tuple(replace(part, bias=part.name in biased) for part in parts.linears))


def _qwen3(keys: SimpleNamespace) -> Parts:
    """Llama with norms on queries and keys, shared by all heads."""
    return _gated(keys, attention_bias=keys.attention_bias, head_norms=True)


def _phi3(keys: SimpleNamespace) -> Parts:
    """Mistral with queries, keys and values in one projection, and gate and up in another."""
    parts, head_dim = _gated(keys), _head_dim(keys)
    heads, grouped = keys.num_attention_heads, keys.num_key_value_heads or keys.num_attention_heads
    shapes = {
        "self_attn.qkv_proj": ((heads + 2 * grouped) * head_dim, keys.hidden_size),
        "self_attn.o_proj": (keys.hidden_size, heads * head_dim),
        "mlp.gate_up_proj": (2 * keys.intermediate_size, keys.hidden_size),
        "mlp.down_proj": (keys.hidden_size, keys.intermediate_size),
    }
    return replace(parts, linears=_in_blocks(keys, "model.layers", shapes, False))


def _gemma2(keys: SimpleNamespace) -> Parts:
    """Llama with a norm before and after attention and MLP."""
    return _gated(keys, attention_bias=keys.attention_bias, norms_per_block=4)


def _gemma3(keys: SimpleNamespace) -> Parts:
    """Gemma 2 with norms on queries and keys."""
    return _gated(keys, attention_bias=keys.attention_bias, norms_per_block=4, head_norms=True)


def _with_experts(
    keys: SimpleNamespace, parts: Parts, count: int, inner: int, *, sparse: int | None = None, biased: bool = False
) -> Parts:
    """Replace the MLP of a gated model by experts, as transformers 5 keeps them: two stacks and a router in a block.

    Args:
        keys: Of the configuration.
        parts: The model with MLPs in their place.
        count: Experts of a block.
        inner: Width of one expert.
        sparse: Blocks that have experts, None for all; the others keep their MLP.
        biased: Whether experts and router have biases.
    """
    blocks, hidden = keys.num_hidden_layers, keys.hidden_size
    sparse = blocks if sparse is None else sparse
    others = tuple(
        linear if ".mlp." not in linear.path else replace(linear, count=blocks - sparse)
        for linear in parts.linears
        if ".mlp." not in linear.path or sparse < blocks
    )
    path, used = "model.layers.*.mlp.experts", keys.num_experts_per_tok
    stacks = tuple(
        Linear(name, out, width, biased, sparse, f"{path}.{name}", count, used)
        for name, out, width in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner))
    )
    router = sparse * count * (hidden + biased)
    dense = keys.intermediate_size if sparse < blocks else 0
    return replace(parts, linears=others + stacks, norms=parts.norms + router, inner=max(used * inner, dense))


def _mixtral(keys: SimpleNamespace) -> Parts:
    return _with_experts(keys, _gated(keys), keys.num_local_experts, keys.intermediate_size)


def _qwen3_moe(keys: SimpleNamespace) -> Parts:
    """Qwen3 with experts in every ``decoder_sparse_step``-th block."""
    sparse = keys.num_hidden_layers // keys.decoder_sparse_step
    return _with_experts(keys, _qwen3(keys), keys.num_experts, keys.moe_intermediate_size, sparse=sparse)


def _olmoe(keys: SimpleNamespace) -> Parts:
    """Mixtral's blocks, with norms over all heads of queries and of keys."""
    parts = _with_experts(
        keys, _gated(keys, attention_bias=keys.attention_bias), keys.num_experts, keys.intermediate_size
    )
    grouped = keys.num_key_value_heads or keys.num_attention_heads
    norms = keys.num_hidden_layers * (keys.num_attention_heads + grouped) * parts.head_dim
    return replace(parts, norms=parts.norms + norms)


def _gpt_oss(keys: SimpleNamespace) -> Parts:
    """Biases everywhere, and a sink for each head; its norms do not go into float16."""
    parts = _gated(keys, attention_bias=keys.attention_bias)
    parts = _with_experts(keys, parts, keys.num_local_experts, keys.intermediate_size, biased=True)
    return replace(
        parts,
        norms=parts.norms + keys.num_hidden_layers * keys.num_attention_heads,
        kept_in_float16=(2 * keys.num_hidden_layers + 1) * keys.hidden_size,
    )


def _opt(keys: SimpleNamespace) -> Parts:
    """Learned positions, layer norms with biases, and projections around the blocks where the embedding is narrower."""
    hidden, inner, blocks = keys.hidden_size, keys.ffn_dim, keys.num_hidden_layers
    width = keys.word_embed_proj_dim or hidden
    shapes = {f"self_attn.{name}": (hidden, hidden) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
    shapes |= {"fc1": (inner, hidden), "fc2": (hidden, inner)}
    linears = _in_blocks(keys, "model.decoder.layers", shapes, keys.enable_bias)
    # OPT-350m is the one released model of this kind: its embedding is half as wide as its blocks.
    if width != hidden:
        linears += (
            Linear("project_out", width, hidden, False, 1, "model.decoder.project_out"),
            Linear("project_in", hidden, width, False, 1, "model.decoder.project_in"),
        )
    # Two layer norms per block, each with weight and bias. A model with norms after the blocks' parts (OPT-350m) needs
    # no last one.
    last_norm = keys.do_layer_norm_before and not keys._remove_final_layer_norm
    norms = (2 * blocks + last_norm) * 2 * hidden if keys.layer_norm_elementwise_affine else 0
    # Two more rows than positions: OPT offsets its positions by two.
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
    # Two layer norms per block and one at the end, each with weight and bias.
    norms = (2 * keys.num_hidden_layers + 1) * 2 * hidden
    return Parts(linears, norms, hidden // keys.num_attention_heads, hidden)


def _phi(keys: SimpleNamespace) -> Parts:
    """Attention and MLP side by side behind one layer norm, biases everywhere, the head included."""
    hidden, inner = keys.hidden_size, keys.intermediate_size
    head_dim = _head_dim(keys)
    shapes = {**_attention(keys, head_dim, "dense"), "mlp.fc1": (inner, hidden), "mlp.fc2": (hidden, inner)}
    # The norms of queries and keys ignore a head_dim of the configuration.
    head_norms = 4 * (hidden // keys.num_attention_heads) if keys.qk_layernorm else 0
    # One layer norm per block and one at the end, each with weight and bias; likewise two for queries and keys.
    norms = keys.num_hidden_layers * (2 * hidden + head_norms) + 2 * hidden
    return Parts(_in_blocks(keys, "model.layers", shapes, True), norms, head_dim, hidden, head_bias=True)


# The order of the numbers in `_defaults` below.
_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings".split()
)
_GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "attention_bias": False}


def _defaults(*sizes: int, **others: int | bool | None) -> dict[str, int | bool | None]:
    return {"tie_word_embeddings": False, **dict(zip(_SIZES, sizes, strict=True)), **others}


def _experts(kind: str, count: int, used: int) -> dict[str, int]:
    return {f"num_{kind}_experts": count, "num_experts_per_tok": used}


_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_QWEN = (151936, 4096, 22016, 32, 32, 32768)

# Checkpoints with more parts, by model type: that of the text part, which alone is loaded (`base.text_part`).
TEXT_PARTS = {"gemma3": "gemma3_text", "mistral3": "ministral3"}

# By model type: the function that counts its parts, and the values transformers takes for keys that are left out.
FAMILIES: dict[str, tuple[Callable[[SimpleNamespace], Parts], dict[str, int | bool | None]]] = {
    "llama": (_llama, _defaults(32000, 4096, 11008, 32, 32, 2048, num_key_value_heads=None, head_dim=None, **_NO_BIAS)),
    "mistral": (_gated, _defaults(32000, 4096, 14336, 32, 32, 131072, num_key_value_heads=8, head_dim=None)),
    "ministral3": (_gated, _defaults(131072, 4096, 14336, 34, 32, 262144, num_key_value_heads=8, head_dim=128)),
    "smollm3": (
        _llama,
        _defaults(
            *(128256, 2048, 11008, 36, 16, 32768),
            num_key_value_heads=4,
            head_dim=None,
            **{**_NO_BIAS, "tie_word_embeddings": True},
        ),
    ),
    "phi3": (_phi3, _defaults(32064, 3072, 8192, 32, 32, 4096, num_key_value_heads=None, head_dim=None)),
    "qwen2": (_qwen2, _defaults(*_QWEN, num_key_value_heads=32, head_dim=None)),
    "qwen3": (_qwen3, _defaults(*_QWEN, num_key_value_heads=32, head_dim=128, attention_bias=False)),
    "gemma2": (_gemma2, _defaults(256000, 2304, 9216, 26, 8, 8192, **_GEMMA)),
    # The text part of a multimodal Gemma 3 names itself so as well.
    "gemma3_text": (_gemma3, _defaults(262208, 2304, 9216, 26, 8, 131072, **_GEMMA)),
    "mixtral": (
        _mixtral,
        _defaults(32000, 4096, 14336, 32, 32, 131072, num_key_value_heads=8, head_dim=None, **_experts("local", 8, 2)),
    ),
    "qwen3_moe": (
        _qwen3_moe,
        _defaults(
            *(151936, 2048, 6144, 24, 32, 32768),
            num_key_value_heads=4,
            head_dim=None,
            attention_bias=False,
            moe_intermediate_size=768,
            decoder_sparse_step=1,
            num_experts=128,
            num_experts_per_tok=8,
        ),
    ),
    "olmoe": (
        _olmoe,
        _defaults(
            *(50304, 2048, 2048, 16, 16, 4096),
            num_key_value_heads=None,
            head_dim=None,
            attention_bias=False,
            num_experts=64,
            num_experts_per_tok=8,
        ),
    ),
    "gpt_oss": (
        _gpt_oss,
        _defaults(
            *(201088, 2880, 2880, 36, 64, 131072),
            num_key_value_heads=8,
            head_dim=64,
            attention_bias=True,
            **_experts("local", 128, 4),
        ),
    ),
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
