"""How a run is carried out on a card: of all the ways that fit, the one that trains most tokens a second. No torch.

All of them compute the recipe's mathematics: micro-batches, checkpointing and the evaluation batch change how a step is
computed, never which step it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..recipe import Recipe
from .cards import Card
from .estimate import OFFLOADING_SPEED, Step, memory_terms, operations_per_token, relative_speed
from .geometry import Geometry

USABLE = 0.94  # of a card's memory; the rest is for the display, the driver, and errors of the estimate
TOKENS = (16384, 8192, 4096, 2048, 1024, 512)  # per micro-batch, to choose from; more gains nothing
CPU_TOKENS = 256  # as fast as more, and the activations stay below what checkpointing would keep
EVAL_ROWS = (8, 4, 2, 1)  # per evaluation batch, to choose from
EIGHTHS = 8  # of the blocks are checkpointed: none, one, ... all


@dataclass(frozen=True)
class Choice:
    """One way to carry out a run, and what it needs.

    Attributes:
        step: How a step is carried out.
        rows, tokens: Limits on a micro-batch; None for no such limit.
        eval_rows: Rows per evaluation batch; 0 without held-out rows.
        terms: Bytes by name.
        operations: Floating-point operations per token.
        speed: Relative to another choice on the same card.
        num_layers: Of the base.
        paged_out: Bytes of optimizer states that a paged optimizer leaves on the host between steps.
    """

    step: Step
    rows: int | None
    tokens: int | None
    eval_rows: int
    terms: dict[str, int]
    operations: float
    speed: float
    num_layers: int
    paged_out: int = 0

    @property
    def checkpointing(self) -> bool | int:
        """As in a recipe's machine section: false, true for all blocks, or the number of blocks."""
        blocks = self.step.checkpointed_blocks
        return blocks if 0 < blocks < self.num_layers else blocks > 0

    @property
    def peak_bytes(self) -> int:
        """All terms together, less what is paged out."""
        return sum(self.terms.values()) - self.paged_out


def choose(recipe: Recipe, geometry: Geometry, card: Card) -> tuple[Choice, bool]:
    """Choose how to run a recipe on a card.

    Args:
        recipe: What it states is kept; where it says ``auto``, the planner chooses.
        geometry: The base.
        card: The device.

    Returns:
        The fastest choice that fits, or the smallest if none does; and whether it fits.
    """
    choices = list(candidates(recipe, geometry, card))
    usable = USABLE * card.memory
    fitting = [choice for choice in choices if choice.peak_bytes <= usable]
    # What lies on the host must travel, which costs time at each step: these two count only where nothing fits without.
    # A paged optimizer's states are in unified memory, which the driver moves to the host under pressure.
    if not fitting and card.is_gpu and recipe.train.optim.startswith("paged"):
        choices = [replace(choice, paged_out=choice.terms["optimizer"]) for choice in choices]
        fitting = [choice for choice in choices if choice.peak_bytes <= usable]
    if not fitting and card.is_gpu and recipe.machine.activation_offloading == "auto":
        paged_out = bool(choices[0].paged_out)
        choices = list(candidates(recipe, geometry, card, offloading=True))
        choices = [replace(choice, paged_out=choice.terms["optimizer"]) for choice in choices] if paged_out else choices
        fitting = [choice for choice in choices if choice.peak_bytes <= usable]
    if fitting:
        # Of two equally fast choices, the one with the larger evaluation batch and the smaller peak.
        return max(fitting, key=lambda choice: (choice.speed, choice.eval_rows, -choice.peak_bytes)), True
    return min(choices, key=lambda choice: choice.peak_bytes), False


def candidates(recipe: Recipe, geometry: Geometry, card: Card, *, offloading: bool | None = None) -> Iterator[Choice]:
    """Yield every choice the recipe leaves open.

    Args:
        recipe, geometry, card: As in `choose`.
        offloading: Whether activations are kept on the host; None as the recipe says, where ``auto`` is no.
    """
    lora, length, machine = None if recipe.trains_all else recipe.adapter, recipe.data.max_length, recipe.machine
    quantization = recipe.quantization
    double_quant = None if quantization is None else quantization.bnb_4bit_use_double_quant
    offloading = machine.activation_offloading is True if offloading is None else offloading
    # bfloat16 or float16 on a GPU, float32 on a CPU.
    compute_bytes = 2 if card.is_gpu else 4
    adapters = None if lora is None else geometry.lora_parameters(lora.r, lora.target_modules)
    layers = geometry.num_layers
    for blocks in _checkpointed_blocks(recipe, layers, card):
        operations = operations_per_token(geometry, adapters, length, checkpointed=blocks / layers) * passes(recipe)
        for rows, limit, tokens in _micro_batches(recipe, TOKENS if card.is_gpu else (CPU_TOKENS,)):
            for eval_rows in _eval_rows(recipe):
                step = Step(
                    tokens,
                    eval_rows * length,
                    blocks,
                    compute_bytes,
                    recipe.train.optim,
                    is_gpu=card.is_gpu,
                    fused_lora=machine.fused_lora is not False,
                    fused_norms=machine.fused_norms is not False,
                    offloading=offloading,
                    length=length,
                    is_bf16=card.has_bf16 and machine.precision != "fp16",
                )
                terms = memory_terms(geometry, lora, step, double_quant=double_quant)
                speed = relative_speed(operations, tokens, in_nf4=quantization is not None) * (
                    OFFLOADING_SPEED if offloading else 1
                )
                yield Choice(step, rows, limit, eval_rows, terms, operations, speed, layers)


def passes(recipe: Recipe) -> int:
    """Return the forward and backward passes per step: several for FreeLB and SymNoise where there is noise."""
    noise = recipe.neftune
    if noise is None or not (noise.noise_alpha or noise.final_alpha):
        return 1
    return 2 if noise.symmetric else noise.adversarial_steps


def _checkpointed_blocks(recipe: Recipe, layers: int, card: Card) -> tuple[int, ...]:
    asked = recipe.machine.activation_checkpointing
    if asked != "auto":
        # bool before int: True is an int too.
        return (layers * asked if isinstance(asked, bool) else min(int(asked), layers),)
    # On a CPU, micro-batches of CPU_TOKENS keep the activations small already; recomputing them would only cost time.
    return tuple(sorted({layers * part // EIGHTHS for part in range(EIGHTHS + 1)})) if card.is_gpu else (0,)


def _micro_batches(recipe: Recipe, budgets: Sequence[int]) -> Iterator[tuple[int | None, int | None, int]]:
    """Yield (limit in rows, limit in tokens, tokens of the largest): at most a whole step, at least one row."""
    length, machine = recipe.data.max_length, recipe.machine
    # Counted with every row at its longest, so no batch of the data can need more. A micro-batch never spans two steps.
    whole_step = recipe.train.effective_batch_size * length
    rows, tokens = _stated(machine.per_device_train_batch_size), _stated(machine.max_tokens_per_micro_batch)
    if rows is not None or tokens is not None:
        by_rows = whole_step if rows is None else rows * length
        # A row longer than the limit is still taken, on its own.
        by_tokens = whole_step if tokens is None else max(tokens, length)
        yield rows, tokens, min(by_rows, by_tokens, whole_step)
        return
    # A set: cut to one row and to one step, several budgets may be the same.
    for budget in sorted({min(max(budget, length), whole_step) for budget in budgets}, reverse=True):
        yield None, budget, budget


def _eval_rows(recipe: Recipe) -> tuple[int, ...]:
    if not recipe.data.has_eval_rows:
        return (0,)
    stated = _stated(recipe.machine.per_device_eval_batch_size)
    return EVAL_ROWS if stated is None else (stated,)


def _stated(value: int | str) -> int | None:
    return None if value == "auto" else int(value)
