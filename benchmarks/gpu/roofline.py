"""The fastest a step could be on a card: operations, weights unpacked, and activations moved, each at full speed.

No torch. Per token of a micro-batch (Llama's proportions, causal attention, TRL's head, which recomputes logits):

- operations: ``(4 or 6) N + 6 V h s + (6 or 8) P + (7 or 9) L h l``, the larger with activation checkpointing: N
  weights in NF4, V vocabulary, h width, s share of tokens with a label, P LoRA weights, L mean tokens of the sequence
  that a token stands in, l layers;
- unpacking: 2.77 bytes a weight and pass (reads 0.52, writes 2, and the first level of double quantization), two
  passes, or three with checkpointing, over all tokens of the forward pass;
- activations: what a step with every elementwise piece fused still moves, counted on Llama-2-7B at rank 16 without
  dropout: 290 bytes a token, layer and unit of width, 393 with checkpointing.

The three take turns on a card, so their times are added. No trainer reaches it; a published one reached 0.76.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

UNPACKED_BYTES = 2.77  # per weight and pass
MOVED_BYTES = {False: 1189e3 / 4096, True: 1610e3 / 4096}  # per token, layer and unit of width; by checkpointing


@dataclass(frozen=True)
class Ceiling:
    """A card's ceilings, measured on it by `probe`.

    Attributes:
        flops: Operations per second of a large matrix product in the compute dtype.
        bandwidth: Bytes per second that a large copy reads and writes.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """What a step has to do.

    Attributes:
        tokens: Of the step, padding not counted.
        passes: Forward passes that they are divided into.
        mean_length: Tokens of the sequence that a token stands in, on average over tokens.
        labelled: Share of the tokens with a label.
        lora: Number of trained weights.
        checkpointing: Whether blocks compute their forward pass twice.
    """

    tokens: int
    passes: int
    mean_length: float
    labelled: float
    lora: int
    checkpointing: bool = False


def linear_weights(geometry: Mapping[str, int]) -> int:
    """Return the weights of all linear layers of a Llama but its head."""
    hidden, inner = geometry["hidden_size"], geometry["intermediate_size"]
    return geometry["num_hidden_layers"] * (4 * hidden * hidden + 3 * hidden * inner)


def lora_weights(geometry: Mapping[str, int], r: int) -> int:
    """Return the weights of LoRA on all of them: ``r (in + out)`` each."""
    hidden, inner = geometry["hidden_size"], geometry["intermediate_size"]
    return geometry["num_hidden_layers"] * r * (4 * 2 * hidden + 3 * (hidden + inner))


def operations_per_token(geometry: Mapping[str, int], work: Work) -> float:
    """Return the floating-point operations of a training step, per token."""
    again = 2 if work.checkpointing else 0
    hidden = geometry["hidden_size"]
    head = 6 * geometry["vocab_size"] * hidden * work.labelled
    attention = (7 + again) * work.mean_length * hidden * geometry["num_hidden_layers"]
    return (4 + again) * linear_weights(geometry) + head + (6 + again) * work.lora + attention


def tokens_per_second(geometry: Mapping[str, int], work: Work, card: Ceiling) -> float:
    """Return the ceiling in tokens per second."""
    arithmetic = work.tokens * operations_per_token(geometry, work) / card.flops
    unpackings = work.passes * (3 if work.checkpointing else 2)
    unpacking = unpackings * UNPACKED_BYTES * linear_weights(geometry) / card.bandwidth
    width = geometry["hidden_size"] * geometry["num_hidden_layers"]
    moving = work.tokens * MOVED_BYTES[work.checkpointing] * width / card.bandwidth
    return work.tokens / (arithmetic + unpacking + moving)


def mean_length(lengths: Sequence[int]) -> float:
    """Return the length of the sequence that a token stands in, on average over tokens."""
    return sum(length * length for length in lengths) / sum(lengths)
