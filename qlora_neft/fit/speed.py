"""How fast a step can be, from counts of operations and a card's datasheet. A range, not a promise. No torch."""

from __future__ import annotations

from .cards import Card
from .geometry import Geometry

# Share of the datasheet's matrix speed that such trainers reach, low and high.
EFFICIENCY = (0.35, 0.6)
# Tokens of a forward pass at which unpacking the NF4 weights takes as long as multiplying by them.
UNPACKING_TOKENS = 230


def operations_per_token(geometry: Geometry, lora_parameters: int, length: int, *, checkpointing: bool) -> float:
    """Floating-point operations of a training step, per token.

    Two for each weight forward, two for the gradient of its input; two more where the forward pass is repeated. The
    base's own weights need no gradient; LoRA's do.

    Args:
        geometry: The base.
        lora_parameters: Trained weights.
        length: Tokens of a sequence, for attention.
        checkpointing: Whether blocks are computed twice forward.
    """
    again = 1 if checkpointing else 0
    base = (4 + 2 * again) * geometry.quantized_parameters()
    head = 6 * geometry.vocab_size * geometry.embedding_width
    attention = (7 + 2 * again) * length * geometry.hidden_size * geometry.num_layers
    return base + head + (6 + 2 * again) * lora_parameters + attention


def relative_speed(operations: float, tokens: int) -> float:
    """What a plan is worth beside another on the same card: fewer operations, and NF4 unpacked for more tokens."""
    return tokens / (tokens + UNPACKING_TOKENS) / operations


def tokens_per_second(card: Card, operations: float, tokens: int) -> tuple[float, float] | None:
    """Low and high estimate, None for a card whose speed is not known."""
    if card.flops is None:
        return None
    most = card.flops * relative_speed(operations, tokens)
    return tuple(share * most for share in EFFICIENCY)
