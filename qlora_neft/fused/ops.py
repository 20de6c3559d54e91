"""The steps between matrix products on the fast path; each function here is a single kernel on CUDA.

What a function does is written in plain torch operations, which run and are tested anywhere. `register` offers a
faster version for one kind of device (``.triton_ops``), used as long as it is registered. Both compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..base.unpack import crosses_rows, flat_shape
from .masks import Mask

P = ParamSpec("P")
R = TypeVar("R")

# Faster versions by name and device type.
_FASTER: dict[tuple[str, str], Callable[..., Any]] = {}
# Where a counter of launches looks on: called with the name, the function to run, and its arguments.
observer: Callable[[str, Callable[..., Any], tuple, dict[str, Any]], Any] | None = None


def register(name: str, device_type: str, function: Callable[..., Any] | None) -> None:
    """Use ``function`` for the operation ``name`` on a kind of device from now on; None for the plain version."""
    if name not in ONE_KERNEL:
        raise KeyError(f"{name}: no operation of the fast path; there are {', '.join(sorted(ONE_KERNEL))}")
    _FASTER.pop((name, device_type), None)
    if function is not None:
        _FASTER[name, device_type] = function


ONE_KERNEL: dict[str, Callable[..., Any]] = {}  # the plain versions, by name


def one_kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Make ``function`` an operation that has faster versions; its first argument, a tensor or module, has a device."""
    name = function.__name__  # ty: ignore[missing-attribute]  # functions have one
    ONE_KERNEL[name] = function

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        device = (first if isinstance(first, Tensor) else first.weight).device.type
        run = _FASTER.get((name, device), function)
        return run(*args, **kwargs) if observer is None else observer(name, run, args, kwargs)

    return call


# ---- Dropout ----


@one_kernel
def dropped(x: Tensor, mask: Mask) -> Tensor:
    """Return ``x``, (M, K), with dropped elements set to 0; the kept ones are *not* scaled up."""
    return x * mask.kept(x.shape[1], x.dtype, x.device)


@one_kernel
def add_dropped_(total: Tensor, x: Tensor, mask: Mask) -> Tensor:
    """Add `dropped` of ``x`` to ``total`` in place, both (M, K); return ``total``."""
    return total.addcmul_(x, mask.kept(x.shape[1], x.dtype, x.device))


# ---- Activations ----


@dataclass(frozen=True)
class Activation:
    """An activation function.

    Attributes:
        name: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``; ``"other"`` for any other.
        function: Applies it.
    """

    name: str
    function: Callable[[Tensor], Tensor]

    def of(self, x: Tensor) -> Tensor:
        """Return activation(x) in memory of its own, which the caller may write to."""
        active = self.function(x)
        return active if self.name in ACTIVATIONS else active.clone()  # of the others, some return their argument

    @torch.no_grad()
    def derivative_times(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return ``grad`` times the derivative at ``x``."""
        if self.name == "silu":
            return torch.ops.aten.silu_backward(grad, x)
        if self.name in ("gelu", "gelu_tanh"):
            approximate = "tanh" if self.name == "gelu_tanh" else "none"
            return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
        if self.name == "relu":
            return torch.ops.aten.threshold_backward(grad, x, 0)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.function(leaf), leaf, grad)[0]


@one_kernel
def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return activation(gate) * up, all (M, F)."""
    return activation.of(gate).mul_(up)


@one_kernel
def gated_backward(gate: Tensor, up: Tensor, grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """Return `gated` again, and the gradients of gate and up; ``grad``, that of `gated`, may be overwritten.

    All (M, F).
    """
    active = activation.of(gate)
    grad_up = active * grad
    grad_gate = activation.derivative_times(grad.mul_(up), gate)
    return active.mul_(up), grad_gate, grad_up


@one_kernel
def activated(x: Tensor, activation: Activation) -> Tensor:
    """Return activation(x), (M, F)."""
    return activation.of(x)


@one_kernel
def activated_backward(x: Tensor, grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return `activated` again, and the gradient of ``x``; ``grad`` may be overwritten."""
    return activation.of(x), activation.derivative_times(grad, x)


# ---- Rotary embeddings ----


@one_kernel
def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Return queries and keys turned by the angles of their positions, or their gradients from those of the result.

    With halves x1, x2 of a head: x1 * cos1 - x2 * sin1 and x2 * cos2 + x1 * sin2 (RoFormer, arXiv:2104.09864, in the
    layout of GPT-NeoX).

    Args:
        q: (B, H, T, D), D even.
        k: (B, H_kv, T, D), in the dtype of ``q``, as all of them.
        cos: (B or 1, T, D).
        sin: As ``cos``.
        back: Whether ``q`` and ``k`` are gradients of the result.
    """
    return _turned(q, cos[:, None], sin[:, None], back), _turned(k, cos[:, None], sin[:, None], back)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    half = x.shape[-1] // 2
    (x1, x2), (sin1, sin2) = x.split(half, -1), sin.split(half, -1)
    y = x * cos
    y1, y2 = y[..., :half], y[..., half:]
    if back:
        y1.addcmul_(x2, sin2)
        y2.addcmul_(x1, sin1, value=-1)
    else:
        y1.addcmul_(x2, sin1, value=-1)
        y2.addcmul_(x1, sin2)
    return y


# ---- The base's weight ----


class Buffers:
    """Memory for one dequantized weight at a time, for each device and dtype, grown to the largest."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def of(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uninitialized memory of a shape; what was taken before is overwritten."""
        memory = self._memory.get((device, dtype))
        if memory is None or memory.numel() < shape.numel():
            self._memory.pop((device, dtype), None)  # freed before the larger one is asked for
            self._memory[device, dtype] = memory = torch.empty(shape.numel(), dtype=dtype, device=device)
        return memory[: shape.numel()].view(shape)

    def clear(self) -> None:
        """Free the memory."""
        self._memory.clear()


WEIGHTS = Buffers()


@one_kernel
def dequantized(linear: Linear4bit, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out, in), that a 4-bit layer stands for.

    It lies in memory that the next call takes over: use it at once and keep no view of it. A backward pass
    dequantizes again (bitsandbytes-foundation/bitsandbytes#2034).
    """
    weight: Any = linear.weight
    state, packed = weight.quant_state, weight.data.view(-1, 1)
    what = packed, _absmax(state), state.blocksize, state.quant_type
    shape = torch.Size(state.shape)
    if packed.device.type == "cpu":  # bitsandbytes has no kernel there that writes into given memory
        by_blocks = flat_shape(shape, state.blocksize) if crosses_rows(packed, state) else shape
        return torch.ops.bitsandbytes.dequantize_4bit.default(*what, by_blocks, dtype).view(shape)
    out = WEIGHTS.of(shape, dtype, packed.device)
    torch.ops.bitsandbytes.dequantize_4bit.out(*what, shape, dtype, out=out)
    return out


# Blocks' scales in float32, by the bytes they were unpacked from; gone with the model.
_ABSMAX = WeakTensorKeyDictionary()


def _absmax(state: Any) -> Tensor:
    """Return the largest magnitude in each block of a weight, float32.

    On a CPU they are unpacked once and kept, an eighth of the packed weight's bytes: memory is plentiful there, and
    for small weights this takes as long as unpacking the weight.
    """
    if not state.nested:
        return state.absmax.float()
    if state.absmax.device.type != "cpu":
        return dequantize_blockwise(state.absmax, state.state2).add_(state.offset).float()
    if state.absmax not in _ABSMAX:
        _ABSMAX[state.absmax] = dequantize_blockwise(state.absmax, state.state2).add_(state.offset).float()
    return _ABSMAX[state.absmax]


def base_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return a frozen linear layer's weight, (out, in), for one product."""
    if isinstance(linear, Linear4bit):
        return dequantized(linear, dtype)
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach().to(dtype)


# ---- Products ----


def product(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """Return alpha * a @ b in one launch."""
    # beta 0: what lies in the new memory is not read, not even if it is NaN.
    return a.new_empty((a.shape[0], b.shape[1])).addmm_(a, b, beta=0, alpha=alpha)


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation("silu", F.silu),
    "gelu": Activation("gelu", F.gelu),
    "gelu_tanh": Activation("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "relu": Activation("relu", F.relu),
}
