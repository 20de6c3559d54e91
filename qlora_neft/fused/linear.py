"""LoRA on frozen linear layers as one autograd function, for one layer or several that read the same input.

    y = x W^T + b + s/q · (x∘m) A^T B^T

W is dequantized once a pass and used at once; m is the dropout mask, q the rate at which it keeps, s LoRA's scaling.
The low-rank products are added to the base's in place. For the backward pass only x and (x∘m) A^T, which is narrow, are
kept: the mask is drawn again from its key, the weight dequantized again. PEFT's modules do the same in separate
operations, each of which reads and writes the whole of y or x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .masks import Mask, keep_rate
from .ops import add_dropped_, base_weight, dropped, product

Gradients = list[Tensor | None]
# Of 16-bit matrices, written as the float32 that they are summed in: since torch 2.8.
_WIDE_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads()


@dataclass(frozen=True)
class Projection:
    """One linear layer with its adapter, as it is used in one call.

    Attributes:
        linear: The frozen base, in NF4 or not.
        lora_a: A, (r, K), in the dtype of the products.
        lora_b: B, (N, r), in the same.
        scaling: LoRA's factor on B A.
        mask: Which elements of the input the adapter sees; None for all.
    """

    linear: nn.Module
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    mask: Mask | None

    @property
    def factor(self) -> float:
        """The factor on B A, with what makes up for the dropped elements."""
        return self.scaling if self.mask is None else self.scaling / keep_rate(self.mask.threshold)

    def seen(self, x: Tensor) -> Tensor:
        """Return what the adapter sees of its input, (M, K)."""
        return x if self.mask is None else dropped(x, self.mask)

    def output(self, x: Tensor, narrow: Tensor) -> Tensor:
        """Return y, (M, N), from the input and its `narrow` product."""
        bias = cast("Tensor | None", self.linear.bias)
        # The adapter's product first: adding to it costs the large product nothing, which arithmetic bounds and not
        # memory. In half precision it is also the smaller of the two that is rounded twice.
        up = self.lora_b.t()
        y = narrow @ up if bias is None else torch.addmm(bias.detach().to(x.dtype), narrow, up)
        return y.addmm_(x, base_weight(self.linear, x.dtype).t())

    def narrow_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient of (x∘m) A^T, (M, r), its factor included."""
        return product(grad, self.lora_b, self.factor)

    def add_adapter_gradient(self, total: Tensor | None, narrow_grad: Tensor, memory: Tensor | None = None) -> Tensor:
        """Return ``total``, (M, K), plus what the adapter gives for the input's gradient, in place if it is there.

        ``memory``, (M, K), may be overwritten.
        """
        if self.mask is None:
            return narrow_grad @ self.lora_a if total is None else total.addmm_(narrow_grad, self.lora_a)
        through = torch.mm(narrow_grad, self.lora_a, out=memory)
        return dropped(through, self.mask) if total is None else add_dropped_(total, through, self.mask)

    def add_base_gradient(self, total: Tensor, grad: Tensor) -> Tensor:
        """Add what the base gives for the input's gradient to ``total``, (M, K), in place."""
        return total.addmm_(grad, base_weight(self.linear, grad.dtype))


def forward(x: Tensor, projections: Sequence[Projection]) -> tuple[list[Tensor], list[Tensor]]:
    """Return each projection's output, (M, N), and its narrow product s/q · (x∘m) A^T, (M, r), of one input (M, K)."""
    narrow = [product(p.seen(x), p.lora_a.t(), p.factor) for p in projections]
    return [p.output(x, n) for p, n in zip(projections, narrow, strict=True)], narrow


def backward(
    x: Tensor,
    narrow: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    projections: Sequence[Projection],
    *,
    wants_input: bool,
) -> tuple[Tensor | None, Gradients]:
    """Return the gradients of the input, (M, K), and of each projection's A and B, in turn.

    Args:
        x: The input, (M, K).
        narrow: As `forward` returned them.
        grads: Gradients of the outputs, (M, N); None for an output that was not used.
        projections: As in `forward`.
        wants_input: Whether the input's gradient is needed.
    """
    total: Tensor | None = None
    of_adapters: Gradients = []
    for p, grad, z in zip(projections, grads, narrow, strict=True):
        if grad is None:
            of_adapters += [None, None]
            continue
        narrow_grad, seen = p.narrow_gradient(grad), p.seen(x)
        of_adapters += [weight_gradient(narrow_grad, seen), weight_gradient(grad, z)]
        if wants_input:
            total = p.add_adapter_gradient(total, narrow_grad, memory=None if seen is x else seen)
    for p, grad in zip(projections, grads, strict=True):
        if total is not None and grad is not None:
            total = p.add_base_gradient(total, grad)
    return total, of_adapters


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad^T x, (N, K), in float32 where the device can: the adapters' gradients are float32."""
    if _WIDE_PRODUCTS and grad.device.type == "cuda" and grad.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return grad.t() @ x


class LoRALinears(torch.autograd.Function):
    """The outputs of several projections of one input; their A and B are arguments only to receive gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: Sequence[Projection], *adapters: Tensor) -> tuple[Tensor, ...]:
        """Return one output (M, N) for each projection of (M, K)."""
        outputs, narrow = forward(x, projections)
        ctx.save_for_backward(x, *narrow)
        ctx.projections = projections
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the input and of every A and B."""
        x, *narrow = ctx.saved_tensors
        wants_input = ctx.needs_input_grad[0]
        grad_x, of_adapters = backward(x, narrow, grads, ctx.projections, wants_input=wants_input)
        return (grad_x, None, *of_adapters)
