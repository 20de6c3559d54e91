"""What the projections of an expert are called, and which of its two weights holds them. No torch."""

from __future__ import annotations

from collections.abc import Iterable

UP_NAMES = ("gate_up_proj", "up_proj")  # of the first weight, with and without a gate
DOWN = "down_proj"
# What a recipe may name, in today's and in older checkpoints' words.
OF_DOWN, OF_UP = ("down_proj", "w2"), ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3")


def is_of_stack(stack: str, names: Iterable[str]) -> bool:
    """Whether one of the names is that of a projection which a stack of experts' weights holds."""
    return not set(OF_DOWN if stack == DOWN else OF_UP).isdisjoint(names)
