"""How much memory a QLoRA run needs, term by term, from the geometry alone. No torch.

The terms are those of the run as this trainer carries it out: NF4 weights, the rest of the base in the compute dtype,
LoRA weights and their gradients in float32, the optimizer's states, and what a step needs for a time. Counts of weights
are exact; what a step needs is a model, to be read back from a real run.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cards import Card
from .geometry import Geometry

# Saved for the backward pass in one block, in multiples of its widths, per token and in the compute dtype: norms,
# projections with their LoRA branches and dropout, attention, the gated MLP, as transformers, PEFT and bitsandbytes
# carry them out without fused kernels.
SAVED_HIDDEN, SAVED_INTERMEDIATE = 8, 5
LIVE_HIDDEN, LIVE_INTERMEDIATE = 4, 3  # alive at once in a block without a backward pass to come
LOSS_TILE_WIDTH, LOSS_TILE_TOKENS = 32768, 4096  # TRL's head computes the loss in such tiles
CONTEXT = int(0.55e9)  # CUDA context and workspaces
SLACK = 0.25  # of what comes and goes: blocks the allocator cannot reuse; published peaks lie above the bare model
OPTIMIZER_BYTES = {"paged_adamw_32bit": 8, "adamw_torch": 8, "paged_adamw_8bit": 2, "adamw_8bit": 2}  # per weight


@dataclass(frozen=True)
class Step:
    """How a step is carried out, as far as memory is concerned.

    Attributes:
        tokens: In the largest micro-batch, padding counted.
        eval_tokens: In the largest evaluation batch.
        checkpointing: Whether blocks recompute their activations.
        compute_bytes: Of one number in the compute dtype, 2 or 4.
        optim: Optimizer.
        is_gpu: Whether there is a CUDA context.
    """

    tokens: int
    eval_tokens: int
    checkpointing: bool
    compute_bytes: int = 2
    optim: str = "paged_adamw_32bit"
    is_gpu: bool = True


def memory_terms(
    geometry: Geometry, r: int, target_modules: str | Sequence[str], step: Step, *, double_quant: bool
) -> dict[str, int]:
    """Bytes of every term, in the order in which they come into being.

    Args:
        geometry: The base.
        r, target_modules: Of LoRA.
        step: See `Step`.
        double_quant: Whether the scales of the base are quantized too.
    """
    lora = geometry.lora_parameters(r, target_modules)
    size = step.compute_bytes
    transient = _training(geometry, step)
    evaluation = _evaluation(geometry, step)
    terms = {
        "weights_nf4": geometry.nf4_bytes(double_quant),
        "weights_not_quantized": geometry.unquantized_parameters() * size,
        "lora": 4 * lora,
        "gradients": 4 * lora,
        "optimizer": OPTIMIZER_BYTES.get(step.optim, 8) * lora,
        **transient,
        "evaluation": max(0, evaluation - sum(transient.values())),
    }
    terms["allocator_slack"] = int(SLACK * (sum(transient.values()) + terms["evaluation"]))
    terms["context"] = CONTEXT if step.is_gpu else 0
    return terms


def _training(geometry: Geometry, step: Step) -> dict[str, int]:
    size, hidden, widest = step.compute_bytes, geometry.hidden_size, geometry.intermediate_size
    block = step.tokens * size * (SAVED_HIDDEN * hidden + SAVED_INTERMEDIATE * widest)
    layers = geometry.num_layers
    return {
        "activations": layers * step.tokens * hidden * size if step.checkpointing else (layers - 1) * block,
        "live_block": block,
        "dequantization": 2 * size * max(linear.out_features * linear.in_features for linear in geometry.linears),
        "loss_tile": _loss_tile(geometry, step.tokens, size),
    }


def _evaluation(geometry: Geometry, step: Step) -> int:
    size, hidden, widest = step.compute_bytes, geometry.hidden_size, geometry.intermediate_size
    block = step.eval_tokens * size * (LIVE_HIDDEN * hidden + LIVE_INTERMEDIATE * widest)
    return block + _loss_tile(geometry, step.eval_tokens, size)


def _loss_tile(geometry: Geometry, tokens: int, size: int) -> int:
    width = min(LOSS_TILE_WIDTH, geometry.vocab_size) if size == 4 else LOSS_TILE_WIDTH
    return size * width * min(tokens, LOSS_TILE_TOKENS) + 3 * size * tokens * geometry.hidden_size


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


BYTES_PER_TOKEN = (2.5, 5.0)  # of a data file, names of columns and quotes included; text and tokenizers differ


def local_bytes(path: str) -> int | None:
    """Bytes of a local data file, or of all a pattern matches; None for data on the Hub."""
    expanded = str(Path(path).expanduser())
    files = [Path(name) for name in (glob.glob(expanded) or [expanded])]
    if not all(file.is_file() for file in files):
        return None
    return sum(file.stat().st_size for file in files)


def tokens_in(num_bytes: int) -> tuple[float, float]:
    """Fewest and most tokens that so much data is likely to be."""
    fine, coarse = BYTES_PER_TOKEN
    return num_bytes / coarse, num_bytes / fine


def seconds(tokens: tuple[float, float], speed: Sequence[float] | None) -> list[int] | None:
    """Shortest and longest time for so many tokens; None where the speed is not known."""
    if speed is None:
        return None
    low, high = speed
    return [round(tokens[0] / high), round(tokens[1] / low)]
