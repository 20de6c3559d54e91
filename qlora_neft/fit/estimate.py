"""How much memory a run needs, term by term, and how fast it trains, from the geometry alone. No torch.

The terms are those of a run as this trainer carries it out: NF4 weights, the rest of the base in the compute dtype,
LoRA weights and their gradients in float32, the optimizer's states, and what a step needs temporarily; or a base that
is not quantized, or every weight trained. Counts of weights are exact; what a step needs is a model, to be checked
against a real run.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..paths import COMPRESSIONS
from ..recipe.schema import Lora
from .activations import Way, block_bytes
from .cards import Card
from .geometry import Geometry

# ---- Memory ----

LIVE_HIDDEN, LIVE_INTERMEDIATE = 4, 3  # alive at once in a block that no backward pass follows
LOSS_TILE_WIDTH, LOSS_TILE_TOKENS = 32768, 4096  # TRL's head computes the loss in such tiles
CONTEXT = int(0.55e9)  # bytes of the CUDA context and workspaces
# Share of what is allocated temporarily: blocks that the allocator cannot reuse. Published peaks lie above the terms.
SLACK = 0.25
# Adam keeps two moments of each trained weight, in 4 bytes or in 1.
OPTIMIZER_BYTES = {"paged_adamw_32bit": 8, "adamw_torch": 8, "paged_adamw_8bit": 2, "adamw_8bit": 2}  # per weight
FLOAT32 = 4  # bytes
OFFLOADED_BLOCKS = 2  # whose activations are on the device all the same: one on its way there, one on its way back
OFFLOADING_SPEED = 0.9  # of the speed without; an assumption


@dataclass(frozen=True)
class Step:
    """How a step is carried out, as far as memory is concerned.

    Attributes:
        tokens: In the largest micro-batch, padding included.
        eval_tokens: In the largest evaluation batch.
        checkpointed_blocks: How many decoder blocks recompute their activations.
        compute_bytes: Size of one number in the compute dtype, 2 or 4.
        optim: Optimizer.
        is_gpu: Whether there is a CUDA context.
        fused_lora, fused_norms: As in a recipe's machine section.
        offloading: Whether what the backward pass needs is kept in host memory.
        length: Tokens of the longest row.
        is_bf16: Whether half precision is bfloat16, not float16.
    """

    tokens: int
    eval_tokens: int
    checkpointed_blocks: int
    compute_bytes: int = 2
    optim: str = "paged_adamw_32bit"
    is_gpu: bool = True
    fused_lora: bool = True
    fused_norms: bool = True
    offloading: bool = False
    length: int = 512
    is_bf16: bool = True


def memory_terms(geometry: Geometry, lora: Lora | None, step: Step, *, double_quant: bool | None) -> dict[str, int]:
    """Return the bytes of every term, in the order in which they are allocated.

    Args:
        geometry: The base.
        lora: The adapter; None if every weight is trained.
        step: How a step is carried out.
        double_quant: Whether the scales of the base are quantized too; None for a base that is not quantized.
    """
    trained = trained_parameters(geometry, lora)
    training = _training_terms(geometry, lora, step)
    if double_quant is None:
        training.pop("dequantization")
    temporary = sum(training.values())
    # A step and an evaluation never hold their temporary tensors at the same time, so of the evaluation only what
    # exceeds the step's counts.
    evaluation = max(0, _evaluation_bytes(geometry, step) - temporary)
    return {
        **_weight_terms(geometry, lora, step, double_quant),
        "gradients": FLOAT32 * trained,
        "optimizer": OPTIMIZER_BYTES.get(step.optim, 8) * trained,
        **training,
        **_optimizer_step(lora, step, trained, temporary),
        "evaluation": evaluation,
        "allocator_slack": int(SLACK * (temporary + evaluation)),
        "context": CONTEXT if step.is_gpu else 0,
    }


def _unquantized_bytes(geometry: Geometry, step: Step) -> int:
    # What an architecture keeps in float32: routers, some norms.
    kept = geometry.float32_in_bfloat16 if step.is_bf16 else geometry.float32_in_float16
    return geometry.unquantized_parameters() * step.compute_bytes + kept * (FLOAT32 - step.compute_bytes)


def _optimizer_step(lora: Lora | None, step: Step, trained: int, temporary: int) -> dict[str, int]:
    # torch's AdamW updates all weights at once on a GPU, with a temporary tensor for each; beside LoRA it is nothing.
    if lora is not None or step.optim != "adamw_torch" or not step.is_gpu:
        return {}
    return {"optimizer_step": max(0, FLOAT32 * trained - temporary)}


def trained_parameters(geometry: Geometry, lora: Lora | None) -> int:
    """Return the number of trained weights, all of the model's without an adapter."""
    return geometry.parameters() if lora is None else geometry.lora_parameters(lora.r, lora.target_modules)


def _weight_terms(geometry: Geometry, lora: Lora | None, step: Step, double_quant: bool | None) -> dict[str, int]:
    copies = 0 if step.compute_bytes == FLOAT32 else step.compute_bytes  # a step computes with in the compute dtype
    if lora is None:
        # Autocast keeps its copies of the matrices for a whole pass; embeddings and norms are used as they are.
        matrices = geometry.quantized_parameters() + geometry.vocab_size * geometry.embedding_width
        return {"weights": FLOAT32 * geometry.parameters(), "weight_copies": copies * matrices}
    if double_quant is None:
        base = {"weights": geometry.quantized_parameters() * step.compute_bytes + _unquantized_bytes(geometry, step)}
    else:
        base = {
            "weights_nf4": geometry.nf4_bytes(double_quant),
            "weights_not_quantized": _unquantized_bytes(geometry, step),
        }
    # LoRA is in float32 whatever the compute dtype is: the trainer undoes TRL's cast of its weights to bfloat16
    # (https://github.com/huggingface/trl/issues/4901).
    return {**base, "lora": (FLOAT32 + copies) * trained_parameters(geometry, lora)}


def _training_terms(geometry: Geometry, lora: Lora | None, step: Step) -> dict[str, int]:
    size, tokens, layers = step.compute_bytes, step.tokens, geometry.num_layers
    if lora is None:
        # Float32 weights make a float32 stream of activations, under autocast too; counted for all of them, which is
        # at most twice as much. A linear layer keeps its input, with an adapter or without.
        size, rank, way = FLOAT32, 0, Way(fused_lora=False, fused_norms=step.fused_norms, half=False, dropout=False)
    else:
        way = Way(step.fused_lora, step.fused_norms, half=size < FLOAT32, dropout=lora.lora_dropout > 0)
        rank = lora.r
    block = block_bytes(geometry, rank, step.length, way)
    checkpoint = geometry.hidden_size * size  # a block's input, all that it keeps if it is repeated
    repeated = min(step.checkpointed_blocks, layers)
    whole = layers - repeated
    # Memory is fullest in the backward pass of the last block, which is not repeated unless all of them are; the
    # others before it still hold what they have kept. With it begins the part that is "live_block".
    kept = repeated * checkpoint + max(whole - 1, 0) * block.kept
    live = (
        block.checkpointed_peak if whole == 0 else max(block.peak, block.checkpointed_peak - (whole - 1) * block.kept)
    )
    if step.offloading:
        kept = min(kept, OFFLOADED_BLOCKS * (block.kept if whole else checkpoint))
    # Or fullest at the loss, when that block has kept what it keeps and has not begun its backward pass.
    loss = _loss_tile_bytes(geometry, tokens, size) + tokens * (block.kept if whole else checkpoint)
    return {
        "activations": round(tokens * kept),
        "live_block": round(tokens * live),
        "dequantization": 2 * size * max(linear.out_features * linear.in_features for linear in geometry.linears),
        "loss_tile": max(0, round(loss - tokens * live)),
    }


def _evaluation_bytes(geometry: Geometry, step: Step) -> int:
    size, hidden, widest = step.compute_bytes, geometry.hidden_size, geometry.intermediate_size
    block = step.eval_tokens * size * (LIVE_HIDDEN * hidden + LIVE_INTERMEDIATE * widest)
    return block + _loss_tile_bytes(geometry, step.eval_tokens, size)


def _loss_tile_bytes(geometry: Geometry, tokens: int, size: int) -> int:
    width = min(LOSS_TILE_WIDTH, geometry.vocab_size) if size == FLOAT32 else LOSS_TILE_WIDTH
    return size * width * min(tokens, LOSS_TILE_TOKENS) + 3 * size * tokens * geometry.hidden_size


# ---- Speed ----

EFFICIENCY = (0.35, 0.6)  # share of the datasheet's matrix speed that such trainers reach, low and high
UNPACKING_TOKENS = 230  # of a forward pass for which unpacking the NF4 weights takes as long as multiplying by them
READING_TOKENS = 80  # likewise for reading 16-bit weights: 2 TB/s beside half of 312 TFLOP/s; not measured


def operations_per_token(geometry: Geometry, lora_parameters: int | None, length: int, *, checkpointed: float) -> float:
    """Return the floating-point operations of a training step, per token.

    A weight costs two operations forward and two for the gradient of its input, and two more if the forward pass is
    repeated. A trained weight costs two more for its own gradient: LoRA's, or the base's without LoRA.

    Args:
        geometry: The base.
        lora_parameters: Number of LoRA's weights; None if the base itself is trained.
        length: Tokens per sequence, for attention.
        checkpointed: Share of the blocks that compute their forward pass twice.
    """
    again = checkpointed
    own = 2 if lora_parameters is None else 0
    base = (4 + own + 2 * again) * geometry.active_parameters()
    head = 6 * geometry.vocab_size * geometry.embedding_width
    attention = (7 + 2 * again) * length * geometry.hidden_size * geometry.num_layers
    return base + head + (6 + 2 * again) * (lora_parameters or 0) + attention


def relative_speed(operations: float, tokens: int, *, in_nf4: bool = True) -> float:
    """Return the speed relative to other plans on the same card: fewer operations, more tokens per weight read."""
    return tokens / (tokens + (UNPACKING_TOKENS if in_nf4 else READING_TOKENS)) / operations


def tokens_per_second(card: Card, operations: float, tokens: int, *, in_nf4: bool = True) -> tuple[float, float] | None:
    """Return a low and a high estimate; None for a card whose speed is not known."""
    if card.flops is None:
        return None
    most = card.flops * relative_speed(operations, tokens, in_nf4=in_nf4)
    low, high = EFFICIENCY
    return low * most, high * most


# ---- Duration ----

BYTES_PER_TOKEN = (2.5, 5.0)  # of a data file, column names and quotes included; depends on text and tokenizer


def local_bytes(path: str) -> int | None:
    """Return the size of a local data file, or of all files a pattern matches; None for data on the Hub, in
    a folder, or compressed."""
    expanded = str(Path(path).expanduser())
    # A name that matches nothing as a pattern is taken as it is: brackets are allowed in file names.
    files = [Path(name) for name in (glob.glob(expanded) or [expanded])]
    if not all(file.is_file() and file.suffix.lower() not in COMPRESSIONS for file in files):
        return None
    return sum(file.stat().st_size for file in files)


def tokens_in(num_bytes: int) -> tuple[float, float]:
    """Return the fewest and the most tokens that a data file of this size is likely to hold."""
    fine, coarse = BYTES_PER_TOKEN
    return num_bytes / coarse, num_bytes / fine


def seconds(tokens: tuple[float, float], speed: Sequence[float] | None) -> list[int] | None:
    """Return the shortest and the longest time for a range of tokens; None if the speed is not known."""
    if speed is None:
        return None
    low, high = speed
    return [round(tokens[0] / high), round(tokens[1] / low)]
