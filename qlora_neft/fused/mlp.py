"""A whole MLP with its adapters as one autograd function: down(act(gate(x)) * up(x)), or down(act(up(x))).

Only the input, gate and up (before the activation) and the adapters' narrow products are kept for the backward pass,
which computes the rest again. As modules the same would keep act(gate) and act(gate) * up as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import linear
from .linear import Projection, weight_gradient
from .ops import Activation, activated, activated_backward, gated, gated_backward


class LoRAMLP(torch.autograd.Function):
    """An MLP's output; A and B of its projections are arguments only to receive gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inner: Sequence[Projection],
        down: Projection,
        activation: Activation,
        *adapters: Tensor,
    ) -> Tensor:
        """Return the output, (M, N), of an input (M, K).

        Args:
            ctx: Autograd's.
            x: The input.
            inner: Gate and up, or up alone.
            down: The projection back.
            activation: Applied to the first of ``inner``.
            adapters: A and B of ``inner`` and ``down``, in turn.
        """
        hidden, narrow = linear.forward(x, inner)
        [y], [down_narrow] = linear.forward(_between(hidden, activation), [down])
        ctx.save_for_backward(x, *hidden, *narrow, down_narrow)
        ctx.inner, ctx.down, ctx.activation = inner, down, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the input and of every A and B."""
        inner, down = ctx.inner, ctx.down
        x, *saved = ctx.saved_tensors
        hidden, narrow, down_narrow = saved[: len(inner)], saved[len(inner) : -1], saved[-1]
        narrow_grad = down.narrow_gradient(grad)
        of_down_b = weight_gradient(grad, down_narrow)
        between_grad = down.add_base_gradient(down.add_adapter_gradient(None, narrow_grad), grad)
        if len(inner) == 2:
            between, *hidden_grads = gated_backward(*hidden, between_grad, ctx.activation)
        else:
            between, *hidden_grads = activated_backward(*hidden, between_grad, ctx.activation)
        of_down_a = weight_gradient(narrow_grad, down.seen(between))
        del between, between_grad  # two of the widest tensors there are
        wants_input = ctx.needs_input_grad[0]
        grad_x, of_inner = linear.backward(x, narrow, hidden_grads, inner, wants_input=wants_input)
        return (grad_x, None, None, None, *of_inner, of_down_a, of_down_b)


def _between(hidden: Sequence[Tensor], activation: Activation) -> Tensor:
    return gated(*hidden, activation) if len(hidden) == 2 else activated(hidden[0], activation)
