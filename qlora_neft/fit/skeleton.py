"""Counts of any causal language model that transformers has, from the model itself, built without weights.

It is made on the meta device by the code that loads a base: the same choice of layers, experts packed, LoRA where the
trainer puts it. All layers are built, which takes about a second, so that no rule about which of them are alike is
needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base.checkpoint import skeleton
from ..base.experts import QuantizedExperts
from ..base.nf4 import float32_islands, nf4_config
from ..base.quantizer import in_nf4, routers
from ..base.targets import linear_layers
from ..base.text_part import causal_model
from ..base.unadaptable import unadaptable
from ..errors import UserInputError, first_line
from ..recipe.schema import Quantization
from .families import Linear

# How many experts a token is sent to, by the names that configurations have for it.
USED = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk", "moe_k")


def counts_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Count a model that transformers builds on the meta device.

    Args:
        config: Content of its ``config.json``. Of a checkpoint that also sees or hears, the text part is counted, which
            alone is loaded.

    Returns:
        The attributes of a `Geometry` by name.

    Raises:
        UserInputError: If transformers cannot build it, or nothing of it would be in NF4.
    """
    model_type = config.get("model_type")
    refusal = f"model.name_or_path: a model of type {model_type!r} cannot be counted from its config.json"
    try:
        whole = _configuration(config)
        model = skeleton(whole)
        model.tie_weights()  # a tie is lost on the meta device, where each parameter is made anew
        model = in_nf4(model, nf4_config(Quantization(), torch.float32))
    except Exception as error:  # transformers checks a configuration's values, with errors of many kinds
        raise UserInputError(f"{refusal}, transformers does not build it. ({first_line(error)})") from error
    quantized = tuple(_quantized(model))
    if not quantized:
        raise UserInputError(f"{refusal}: it has no linear layers, so nothing would be in NF4.")
    causal = causal_model(whole)
    return _attributes(model, quantized) | {
        "left_out": causal.without if causal is not None and causal.is_text_part else ()
    }


def _configuration(config: Mapping[str, Any]) -> PreTrainedConfig:
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"it has no {model_type}")
    keys = {key: _number(value) for key, value in config.items() if key not in ("model_type", "quantization_config")}
    return AutoConfig.for_model(model_type, **keys)


def _number(value: Any) -> Any:
    """Return a value of a configuration with the numbers that JSON lacks, which transformers writes as objects."""
    if isinstance(value, list | tuple):
        return [_number(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _number(v) for k, v in value.items()}


def _attributes(model: PreTrainedModel, quantized: tuple[Linear, ...]) -> dict[str, Any]:
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert isinstance(embedding, Tensor)  # (vocabulary, width)
    tied = head is not None and head.weight is embedding
    tables = {id(p): p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head_parameters = 0 if head is None or tied else sum(p.numel() for p in head.parameters())
    own = dict(_not_quantized(model))
    total = _numbers(own.values())
    bfloat16, float16 = (float32_islands(model, dtype) for dtype in (torch.bfloat16, torch.float16))
    heads = getattr(config, "num_attention_heads", None)
    # Some configurations write them layer by layer; the planner wants the most of any.
    heads = max(heads, default=0) if isinstance(heads, (list, tuple)) else heads or 0
    hidden = config.hidden_size
    return {
        "model_type": config.model_type,
        "hidden_size": hidden,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "head_dim": (_head_dim(config) or hidden // heads) if heads else 0,
        "intermediate_size": max(part.used * max(part.out_features, part.in_features) for part in quantized),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "embedding_width": embedding.shape[1],
        "tied": tied,
        "linears": quantized,
        "embedding_parameters": sum(tables.values()),
        "head_parameters": head_parameters,
        "other_parameters": total - sum(tables.values()) - head_parameters,
        "other_linears": tuple(_others(model)),
        "float32_in_bfloat16": _numbers(param for name, param in own.items() if name in bfloat16),
        "float32_in_float16": _numbers(param for name, param in own.items() if name in float16),
    }


def _numbers(params: Iterable[nn.Parameter]) -> int:
    """Return how many numbers parameters hold, one that is tied once."""
    return sum({id(param): param.numel() for param in params}.values())


def _head_dim(config: Any) -> int | None:
    """Return the width of a head, the largest where layers differ (gemma4)."""
    try:
        return getattr(config, "head_dim", None)
    except RuntimeError:  # transformers refuses to name one for all layers
        own = [config.per_layer_config[i].head_dim for i in range(config.num_hidden_layers)]
        return max(own, default=None)


def _quantized(model: PreTrainedModel) -> Iterator[Linear]:
    """Yield what is in NF4, layer by layer, a layer's experts as two stacks."""
    refused = unadaptable(model)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield _linear(name, module.out_features, module.in_features, module.bias is not None, refused)
        elif isinstance(module, QuantizedExperts):
            # Experts that are not told their tokens compute with all of them.
            used = _used(model) if module.layout.is_routed else module.num_experts
            for stack, (out, width) in module.matrix_shapes.items():
                sizes = (width, out) if module.layout.turned else (out, width)
                yield Linear(stack, *sizes, module.layout.has_bias, 1, f"{name}.{stack}", module.num_experts, used)


def _used(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    found = (getattr(config, key, None) for key in USED)
    return next((number for number in found if isinstance(number, int) and number > 0), 1)


def _others(model: PreTrainedModel) -> Iterator[Linear]:
    """Yield the linear layers that stay in 16 bits, the head apart: routers, and what the loader leaves out."""
    refused, chosen = unadaptable(model), set(routers(model))
    layers = linear_layers(model)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) or not (name in layers or name in chosen):
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        sizes = tuple(weight.shape)  # (out, in); Conv1D's is (in, out)
        out, width = sizes[::-1] if isinstance(module, Conv1D) else sizes
        yield _linear(name, out, width, module.bias is not None, refused, adapted=name not in chosen)


def _linear(name: str, out: int, width: int, bias: bool, refused: Mapping[str, str], adapted: bool = True) -> Linear:
    why = refused.get(name, "")
    last = name.rpartition(".")[2]
    return Linear(last, out, width, bias, 1, name, adapted=adapted and not why, refused=why)


def _not_quantized(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are not in NF4; one that is tied, under each of its names."""
    for prefix, module in model.named_modules():
        for own, param in module.named_parameters(recurse=False):
            packed = isinstance(module, Linear4bit) and own == "weight"
            if not packed and not (isinstance(module, QuantizedExperts) and own in module.matrix_shapes):
                yield f"{prefix}.{own}" if prefix else own, param
