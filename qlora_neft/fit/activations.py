"""What a decoder block keeps for the backward pass, and what it needs at most, in bytes a token. No torch.

The figures are sums over the widths of a model; of the sums of one figure, the largest holds: a block's peak is in its
attention or in its MLP. Their factors are solved from counts of small models
(``benchmarks/step_counter/terms.py`` writes ``activation_terms.json``), and a test counts other models and compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..files import read_json
from .geometry import Geometry

LIKE = "llama"  # how a family that is not in the table is counted: gated MLP, grouped attention, two norms
# A norm by the model's own operations keeps a float32 copy of its input, where the fused one keeps the input.
NORM_COPY, NORMS = 2, 2  # bytes more a number at half precision; norms a block


@dataclass(frozen=True)
class Way:
    """How a block is computed.

    Attributes:
        fused_lora, fused_norms: As in a recipe's machine section.
        half: Half precision; else float32.
        dropout: Whether LoRA has dropout.
    """

    fused_lora: bool = True
    fused_norms: bool = True
    half: bool = True
    dropout: bool = True


@dataclass(frozen=True)
class BlockBytes:
    """One block, in bytes a token.

    Attributes:
        kept: What it keeps for the backward pass.
        peak: What is alive in it at most, forward or backward.
        checkpointed_peak: The same where its forward pass is repeated.
    """

    kept: float
    peak: float
    checkpointed_peak: float


def block_bytes(geometry: Geometry, r: int, length: int, way: Way) -> BlockBytes:
    """Return what one block takes.

    Args:
        geometry: The base.
        r: LoRA's rank. Counted with adapters on all linear layers; on fewer, it is less.
        length: Tokens of a row: where attention keeps its scores, they grow with it.
        way: How it is computed.
    """
    families = _table()["terms"]
    terms = families.get(geometry.model_type, families[LIKE])[_key(way)]
    widths = (
        geometry.hidden_size,
        geometry.num_attention_heads * geometry.head_dim,
        _key_width(geometry),
        geometry.intermediate_size,
        geometry.num_attention_heads,
        r,
        1,
        geometry.num_attention_heads * length,
    )
    more = 0 if way.fused_norms or not way.half else NORM_COPY * NORMS * geometry.hidden_size
    found = {
        name: more + max(sum(factor * width for factor, width in zip(one, widths, strict=True)) for one in sums)
        for name, sums in terms.items()
    }
    return BlockBytes(**found)


def _key_width(geometry: Geometry) -> int:
    """Return the width of the keys, which groups of query heads may share."""
    found = [linear.out_features for linear in geometry.linears if linear.name == "k_proj"]
    return found[0] if found else geometry.num_attention_heads * geometry.head_dim


def _key(way: Way) -> str:
    precision = "half" if way.half else "float32"
    return f"{'fused' if way.fused_lora else 'modules'}, {precision}, {'' if way.dropout else 'no '}dropout"


@cache
def _table() -> dict[str, Any]:
    return read_json(Path(__file__).with_name("activation_terms.json"))
