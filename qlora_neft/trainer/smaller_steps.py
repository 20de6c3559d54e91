"""How small micro-batches have to be, found out by running out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Largest micro-batches.

    Attributes:
        rows: Sequences.
        tokens: Tokens, padding counted; None for no such limit.
        is_smaller: Whether it is not what the run began with.
    """

    rows: int
    tokens: int | None = None
    is_smaller: bool = False

    def __iter__(self) -> Iterator[int | None]:
        return iter((self.rows, self.tokens))

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else f" and {self.tokens} tokens"
        return f"micro-batches of at most {self.rows} {'sequence' if self.rows == 1 else 'sequences'}{tokens}"

    def at_most(self, rows: int, tokens: int | None) -> Split:
        """The smaller of two, each way."""
        limits = [limit for limit in (self.tokens, tokens) if limit is not None]
        return Split(min(self.rows, rows), min(limits) if limits else None, is_smaller=True)


def smaller(split: Split, rows: int, tokens: int) -> Split:
    """Half of what did not fit.

    Args:
        split: The limits so far.
        rows: Sequences of the micro-batch that did not fit, more than one.
        tokens: Its tokens, padding counted.
    """
    return split.at_most(rows // 2, None if split.tokens is None else max(tokens // 2, 1))


def too_large(tokens: int, rows: int, error: str) -> str:
    """What to say when nothing smaller is left to try."""
    what = f"one sequence of {tokens} tokens" if rows <= 1 else f"a micro-batch of {rows} sequences"
    detail = error.strip().splitlines()[0] if error.strip() else "out of memory"
    return (
        f"out of memory: {what} does not fit on this device ({detail}). In this order: "
        "machine.activation_checkpointing=true, a lower data.max_length, optim paged_adamw_8bit, a lower lora.r, a "
        "smaller base. What was learned so far is in the newest checkpoint; machine settings may change on a resume."
    )
