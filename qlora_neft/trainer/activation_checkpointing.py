"""Activation checkpointing of some blocks: recompute as much as memory asks for, and no more."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer


class CheckpointSomeBlocks(TrainerCallback):
    """Keep activation checkpointing on for the first ``num_blocks`` decoder blocks only.

    Args:
        num_blocks: Blocks that recompute their activations in the backward pass, at least 1.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Upstream has just switched it on for every block."""
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for block in blocks[self.num_blocks :]:
            block.gradient_checkpointing = False
