"""RMSNorm in few passes over memory, and nothing kept for the backward pass but its input and one number a row.

transformers writes its norms as eight or nine tensor operations, most of them in float32: at half precision they move
as much memory as the rest of a block's elementwise work together. Here they are one operation forward and one backward
on CUDA, by torch's own kernel or, for weights that act as 1 + w, by Triton's; elsewhere seven each, none of which
converts a whole tensor. At half precision the kernels round once and these seven up to three times, as often as the
norms of most families do.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .ops import one_kernel

EPSILON_NAMES = ("variance_epsilon", "eps")
_PROBE_SCALES = (1e-3, 1.0, 1e2)  # of the first, the mean square is as small as epsilon, which therefore shows


# ---- The function ----


@one_kernel
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return x / sqrt(mean(x²) + eps) · (offset + weight), and the reciprocal root.

    Args:
        x: (..., D).
        weight: (D,) in the dtype of ``x``; None for a norm without one.
        eps: Added to the mean square.
        offset: 0, or 1 where the stored weight is the difference from one (Gemma).

    Returns:
        (..., D) in the dtype of ``x``, and (..., 1) in float32.
    """
    return _norm_by_torch(x, weight, eps) if by_torch(x, offset) else _plain_norm(x, weight, eps, offset)


@one_kernel
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float) -> Tensor:
    """Return the gradient of `rms_norm` with respect to ``x``; the arguments as there."""
    if by_torch(x, offset):
        return _backward_by_torch(grad, x, weight, rstd)
    return _plain_backward(grad, x, weight, rstd, offset)


def _plain_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
    # Computed in float32 and rounded once, without a float32 copy of x.
    y = torch.mul(x, rstd, out=torch.empty_like(x))
    if weight is not None:
        y.mul_(weight if offset == 0 else offset + weight.float())
    return y, rstd


def _plain_backward(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float) -> Tensor:
    # With g = dy * w: dx = rstd * (g - x * rstd**2 * mean(g * x)).
    scale = weight if weight is None or offset == 0 else offset + weight.float()
    g = grad.clone() if scale is None else torch.mul(grad, scale, out=torch.empty_like(x))
    mean = (g * x).sum(-1, keepdim=True, dtype=torch.float32).div_(-x.shape[-1])  # (..., 1)
    torch.addcmul(g, x, mean.mul_(rstd).mul_(rstd), out=g)
    return g.mul_(rstd)


class RMSNorm(torch.autograd.Function):
    """`rms_norm` with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        """Return the normed input."""
        y, rstd = rms_norm(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the input alone."""
        x, weight, rstd = ctx.saved_tensors
        return rms_norm_backward(grad, x, weight, rstd, ctx.offset), None, None, None


def by_torch(x: Tensor, offset: float) -> bool:
    """Return whether `rms_norm` of ``x`` is a kernel of torch's own."""
    return offset == 0 and x.device.type == "cuda" and _torch_has_a_kernel()


@cache
def _torch_has_a_kernel() -> bool:
    """Return whether torch's own kernel does what the plain operations do, tried once on the current GPU.

    It is not a public function: before torch 2.9 it returned no reciprocal root, and it may change again.
    """
    operator = getattr(torch.ops.aten, "_fused_rms_norm", None)
    if operator is None or len(operator.default._schema.returns) != 2:
        return False
    x, weight = torch.linspace(-1, 2, 96, device="cuda").view(2, 48), torch.linspace(0.5, 2, 48, device="cuda")
    try:
        found = _norm_by_torch(x, weight, 1e-6)
        backward = _backward_by_torch(x.flip(0), x, weight, found[1])
    except (RuntimeError, TypeError, ValueError):
        return False
    expected = _plain_norm(x, weight, 1e-6, 0.0)
    pairs = zip((*found, backward), (*expected, _plain_backward(x.flip(0), x, weight, expected[1], 0.0)), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def _norm_by_torch(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)


def _backward_by_torch(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> Tensor:
    # The mask asks for the gradient of the input alone.
    return torch.ops.aten._fused_rms_norm_backward(grad, x, x.shape[-1:], rstd, weight, [True, False])[0]


# ---- The modules ----


class FewPassNorm(nn.Module):
    """Mixed in front of a norm's own class: in training, its mathematics by `RMSNorm` wherever that is the same."""

    # Of the dynamic class, one for each (class, offset).
    norm_offset: float
    epsilon_name: str

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the norm of (..., D)."""
        weight = cast("Tensor | None", getattr(self, "weight", None))
        # In evaluation the model is bit for bit the one that others load. A weight that trains needs a gradient, and
        # of mixed dtypes families make different ones.
        other = weight is not None and (weight.requires_grad or weight.dtype != hidden_states.dtype)
        if other or not self.training:
            return super().forward(hidden_states)
        return RMSNorm.apply(hidden_states, weight, getattr(self, self.epsilon_name), self.norm_offset)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as a module of the own class, which other processes know."""
        return _as_it_was, (type(self).__bases__[1],), vars(self)


def _as_it_was(own: type[nn.Module]) -> nn.Module:
    return own.__new__(own)


def install_norms(model: nn.Module) -> int:
    """Give every RMSNorm of a model the fast path, by the class of the instance; return how many have it.

    A norm is known by its form, and each class is compared once with its own forward pass; any other module is left
    alone. `uninstall_norms` takes it back.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, FewPassNorm) or (known := _known_norm(module)) is None:
            continue
        module.__class__ = _fast_class(type(module), *known)
        count += 1
    return count


def uninstall_norms(model: nn.Module) -> None:
    """Give every norm its own class back."""
    for module in model.modules():
        if isinstance(module, FewPassNorm):
            module.__class__ = type(module).__bases__[1]


@cache
def _fast_class(own: type[nn.Module], epsilon_name: str, offset: float) -> type[nn.Module]:
    # Under its own name: what prints or matches class names finds what it knows.
    members = {"norm_offset": offset, "epsilon_name": epsilon_name, "__module__": own.__module__}
    return type(own.__name__, (FewPassNorm, own), members)


_KNOWN: dict[tuple, tuple[str, float] | None] = {}


def _known_norm(module: nn.Module) -> tuple[str, float] | None:
    """Return the name of a norm's epsilon and its weight's offset; None for anything but an RMSNorm."""
    if not _looks_like_a_norm(module):
        return None
    names = [name for name in EPSILON_NAMES if isinstance(getattr(module, name, None), float)]
    if len(names) != 1:
        return None
    # Some classes compute something else by a flag of the instance, such as the size of a group.
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in (*EPSILON_NAMES, "training")}
    key = (type(module), names[0], hasattr(module, "weight"), repr(sorted(plain.items())))
    if key not in _KNOWN:
        offset = _offset_by_trial(module, names[0])
        _KNOWN[key] = None if offset is None else (names[0], offset)
    return _KNOWN[key]


def _looks_like_a_norm(module: nn.Module) -> bool:
    own = type(module)
    if not own.__name__.endswith("Norm") or own.__module__.startswith("torch.nn"):
        return False
    parameters = dict(module.named_parameters())
    if list(module.children()) or list(module.buffers()) or not set(parameters) <= {"weight"}:
        return False
    if any(p.dim() != 1 for p in parameters.values()):
        return False
    return len(inspect.signature(own.forward).parameters) == 2  # self and the input


@torch.no_grad()
def _offset_by_trial(module: nn.Module, epsilon_name: str) -> float | None:
    """Return the offset with which `rms_norm` gives what the module gives itself, None if none does."""
    probe = copy.deepcopy(module)
    weight, generator = getattr(module, "weight", None), torch.Generator().manual_seed(0)
    size = 16 if weight is None else weight.shape[0]
    on_cpu: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever the caller's defaults
    scales = torch.tensor(_PROBE_SCALES, **on_cpu)[:, None, None]
    x = torch.randn(len(_PROBE_SCALES), 2, size, generator=generator, **on_cpu) * scales
    if weight is not None:
        # Weights as they were made would tell little: they may all be one.
        weight = torch.rand(size, generator=generator, **on_cpu) + 0.5
        probe.weight = nn.Parameter(weight)
    try:
        expected = type(module).forward(probe, x)
        rounded = type(module).forward(probe.to(torch.bfloat16), x.bfloat16())
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it takes something else than (..., D)
        return None
    if expected.shape != x.shape or rounded.dtype != torch.bfloat16:
        return None
    for offset in (0.0, 1.0):
        y, _ = rms_norm(x, weight, getattr(module, epsilon_name), offset)
        if torch.allclose(y, expected, rtol=1e-5, atol=0):
            return offset
    return None
