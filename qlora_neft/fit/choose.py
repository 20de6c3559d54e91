"""How a run is carried out on a card: of all ways that fit, the one that trains most tokens a second. No torch.

The mathematics is the recipe's in every one of them: micro-batches, checkpointing and the evaluation batch change how a
step is computed, never which step it is. Further ways (checkpointing of some blocks, streamed blocks) join as further
candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .cards import Card
from .estimate import Step, memory_terms, operations_per_token, relative_speed
from .geometry import Geometry

USABLE = 0.94  # of a card's memory; the rest is the display's, the driver's, and for being wrong
TOKENS = (16384, 8192, 4096, 2048, 1024, 512)  # of a micro-batch; beyond the first nothing is gained
CPU_TOKENS = 256  # as fast as more, and the activations stay below what checkpointing would keep
EVAL_ROWS = (8, 4, 2, 1)


@dataclass(frozen=True)
class Wanted:
    """What the recipe states, as far as memory and speed depend on it; None where the plan may choose.

    Attributes:
        max_length: Tokens of the longest sequence.
        effective_batch_size: Sequences per optimizer step.
        r, target_modules: Of LoRA.
        double_quant: Whether the scales of the base are quantized too.
        optim: Optimizer.
        rows, tokens: Of a micro-batch at most.
        checkpointing: Whether all blocks recompute their activations.
        eval_rows: Of an evaluation batch; 0 without held-out rows.
        passes: Forward and backward passes per step; above 1 for FreeLB.
    """

    max_length: int
    effective_batch_size: int
    r: int
    target_modules: str | tuple[str, ...] = "all-linear"
    double_quant: bool = True
    optim: str = "paged_adamw_32bit"
    rows: int | None = None
    tokens: int | None = None
    checkpointing: bool | None = None
    eval_rows: int | None = None
    passes: int = 1


@dataclass(frozen=True)
class Choice:
    """One way to carry a run out, and what it needs.

    Attributes:
        step: See `Step`.
        rows, tokens: Of a micro-batch at most; None for no such limit.
        eval_rows: Of an evaluation batch.
        terms: Bytes by name.
        operations: Per token.
        speed: Worth beside another choice on the same card.
        paged_out: Bytes of optimizer states that a paged optimizer leaves on the host between steps.
    """

    step: Step
    rows: int | None
    tokens: int | None
    eval_rows: int
    terms: dict[str, int]
    operations: float
    speed: float
    paged_out: int = 0

    @property
    def peak_bytes(self) -> int:
        """All terms together, less what is paged out."""
        return sum(self.terms.values()) - self.paged_out


def choose(geometry: Geometry, wanted: Wanted, card: Card) -> tuple[Choice, bool]:
    """The fastest choice that fits, or the smallest if none does; and whether it fits."""
    choices = list(candidates(geometry, wanted, card))
    usable = USABLE * card.memory
    whole = [choice for choice in choices if choice.peak_bytes <= usable]
    if not whole and card.is_gpu and wanted.optim.startswith("paged"):
        choices = [replace(choice, paged_out=choice.terms["optimizer"]) for choice in choices]
        whole = [choice for choice in choices if choice.peak_bytes <= usable]
    if whole:
        # Of two as fast, the one with the larger evaluation batch and the smaller peak.
        return max(whole, key=lambda choice: (choice.speed, choice.eval_rows, -choice.peak_bytes)), True
    return min(choices, key=lambda choice: choice.peak_bytes), False


def candidates(geometry: Geometry, wanted: Wanted, card: Card) -> Iterator[Choice]:
    """Every choice the recipe leaves open."""
    size = 2 if card.is_gpu else 4
    lora = geometry.lora_parameters(wanted.r, wanted.target_modules)
    ways = (False, True) if card.is_gpu else (False,)
    for checkpointing in ways if wanted.checkpointing is None else (wanted.checkpointing,):
        operations = operations_per_token(geometry, lora, wanted.max_length, checkpointing=checkpointing)
        operations *= wanted.passes
        for rows, limit, tokens in _micro_batches(wanted, TOKENS if card.is_gpu else (CPU_TOKENS,)):
            for eval_rows in _eval_rows(wanted):
                step = Step(tokens, eval_rows * wanted.max_length, checkpointing, size, wanted.optim, card.is_gpu)
                terms = memory_terms(geometry, wanted.r, wanted.target_modules, step, double_quant=wanted.double_quant)
                speed = relative_speed(operations, tokens)
                yield Choice(step, rows, limit, eval_rows, terms, operations, speed)


def _micro_batches(wanted: Wanted, budgets: Sequence[int]) -> Iterator[tuple[int | None, int | None, int]]:
    """(rows at most, tokens at most, tokens of the largest): never more than a whole step, never less than a row."""
    whole_step = wanted.effective_batch_size * wanted.max_length
    if wanted.rows is not None or wanted.tokens is not None:
        by_rows = whole_step if wanted.rows is None else wanted.rows * wanted.max_length
        by_tokens = whole_step if wanted.tokens is None else max(wanted.tokens, wanted.max_length)
        yield wanted.rows, wanted.tokens, min(by_rows, by_tokens, whole_step)
        return
    sizes = {min(max(tokens, wanted.max_length), whole_step) for tokens in budgets}
    for tokens in sorted(sizes, reverse=True):
        yield None, tokens, tokens


def _eval_rows(wanted: Wanted) -> tuple[int, ...]:
    return EVAL_ROWS if wanted.eval_rows is None else (wanted.eval_rows,)
