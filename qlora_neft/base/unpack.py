"""NF4 unpacked as it was packed, on every device.

bitsandbytes packs a weight in blocks of 64 numbers that run on from row to row. Its CPU kernel unpacks each row in
blocks of its own (0.50.2, ``backends/cpu/ops.py``), so that a layer whose number of inputs is not a multiple of 64 gets
other blocks' scales there: three times the error of NF4 itself, and another base than the same bytes are on a GPU.
Widths that are no multiple of 64 are rare in released models, but not unknown (172 in stories260K). Everything here can
go when the kernel counts blocks through the rows; reported nowhere yet.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def unpacked(packed: Tensor, state: QuantState) -> Tensor:
    """Return the matrix, (out, in), that packed bytes stand for, in the dtype that the state names."""
    if not crosses_rows(packed, state):
        return dequantize_4bit(packed, state)
    shape, by_blocks = _shape(state), copy.copy(state)
    by_blocks.shape = flat_shape(shape, cast(int, state.blocksize))
    return dequantize_4bit(packed, by_blocks).view(shape)


def crosses_rows(packed: Tensor, state: QuantState) -> bool:
    """Return whether blocks run on from row to row where bitsandbytes would begin new ones."""
    return packed.device.type == "cpu" and _shape(state)[-1] % cast(int, state.blocksize) != 0


def _shape(state: QuantState) -> torch.Size:
    return torch.Size(cast("tuple[int, ...]", state.shape))  # None only before a weight is packed


def flat_shape(shape: torch.Size, blocksize: int) -> torch.Size:
    """Return a shape of as many numbers in which no block runs on from row to row."""
    count = shape.numel()
    # The kernel shares rows among threads, so one row is the last resort.
    return torch.Size((count // blocksize, blocksize) if count % blocksize == 0 else (1, count))


def unpack_by_blocks(model: nn.Module) -> None:
    """Let the 4-bit layers that bitsandbytes would unpack wrongly on this device compute with what was packed."""
    for module in model.modules():
        if type(module) is not Linear4bit:
            continue
        weight = cast(Any, module.weight)
        state = getattr(weight, "quant_state", None)
        if state is not None and crosses_rows(weight.data, state):
            module.__class__ = Linear4bitByBlocks


class Linear4bitByBlocks(Linear4bit):
    """bitsandbytes' layer, with a weight unpacked by `unpacked`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, (..., out), of (..., in), in the dtype of ``x``."""
        dtype = self.compute_dtype or x.dtype
        y = _Product.apply(x.to(dtype), self)
        return (y if self.bias is None else y + self.bias.to(dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """x W^T, with W unpacked again for the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return x @ _weight(layer, x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ _weight(ctx.layer, grad.dtype), None


def _weight(layer: Linear4bit, dtype: torch.dtype) -> Tensor:
    weight = cast(Any, layer.weight)
    return unpacked(weight.data, weight.quant_state).to(dtype)
