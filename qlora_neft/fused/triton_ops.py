"""The operations of `.ops` and `.norm`, each as one launch of a Triton kernel.

Triton is imported by the first call only: Windows, macOS and CPU builds of torch come without it. `.kernel_check`
decides where these take the place of the plain versions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from ..noise.streams import SIXTEENS_PER_BLOCK
from .masks import Mask
from .norm import by_torch
from .ops import ONE_KERNEL, WEIGHTS, Activation

COLUMNS_AT_ONCE = 1024  # numbers of a program, 8 for each of 128 threads
GROUPS_AT_ONCE = 128  # Philox blocks of a program, one for each thread
BYTES_AT_ONCE = 1024  # packed: twice as many numbers
NUMBERS_AT_ONCE = 1024  # of short rows, several are normed by one program
WIDEST_NORM = 2**15  # numbers; a row is held in registers
TORCHS_NORM = 1024  # numbers in a row from which torch's own kernel, one program a row, is preferred


# ---- Dropout ----


def dropped(x: Tensor, mask: Mask) -> Tensor:
    """`ops.dropped`."""
    x = _dense_rows(x)
    return _drop(x, x.new_empty(x.shape), mask, add=False)


def add_dropped_(total: Tensor, x: Tensor, mask: Mask) -> Tensor:
    """`ops.add_dropped_`."""
    if total.stride(-1) != 1:  # written in place, so that it cannot be made dense
        return ONE_KERNEL["add_dropped_"](total, x, mask)
    return _drop(_dense_rows(x), total, mask, add=True)


def _drop(x: Tensor, out: Tensor, mask: Mask, *, add: bool) -> Tensor:
    rows, columns = x.shape
    blocks = -(-columns // SIXTEENS_PER_BLOCK)
    groups = min(GROUPS_AT_ONCE, _power_of_two(blocks))
    positions, keys = mask.places.table(x.device)
    if x.numel():
        with _on(x):
            _kernel("dropped")[rows, -(-blocks // groups)](
                x, out, positions, keys, mask.places.seed, mask.module, mask.threshold, columns, blocks,
                x.stride(0), out.stride(0), ADD=add, GROUPS=groups,
            )  # fmt: skip
    return out


# ---- Activations ----


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`ops.gated`."""
    if activation.name == "other":
        return ONE_KERNEL["gated"](gate, up, activation)
    return _activate(_dense_rows(gate), _dense_rows(up), activation)


def activated(x: Tensor, activation: Activation) -> Tensor:
    """`ops.activated`."""
    if activation.name == "other":
        return ONE_KERNEL["activated"](x, activation)
    return _activate(_dense_rows(x), None, activation)


def gated_backward(gate: Tensor, up: Tensor, grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.gated_backward`."""
    if activation.name == "other":
        return ONE_KERNEL["gated_backward"](gate, up, grad, activation)
    active, grad_gate, grad_up = _activate_backward(_dense_rows(gate), _dense_rows(up), grad, activation)
    assert grad_up is not None
    return active, grad_gate, grad_up


def activated_backward(x: Tensor, grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """`ops.activated_backward`."""
    if activation.name == "other":
        return ONE_KERNEL["activated_backward"](x, grad, activation)
    return _activate_backward(_dense_rows(x), None, grad, activation)[:2]


def _activate(gate: Tensor, up: Tensor | None, activation: Activation) -> Tensor:
    out = gate.new_empty(gate.shape)
    if gate.numel():
        other = gate if up is None else up  # Triton wants a tensor even where it reads none
        with _on(gate):
            _kernel("gated")[_grid(gate)](
                gate, other, out, gate.shape[1], gate.stride(0), other.stride(0), out.stride(0),
                KIND=activation.name, GATED=up is not None, BLOCK=COLUMNS_AT_ONCE,
            )  # fmt: skip
    return out


def _activate_backward(
    gate: Tensor, up: Tensor | None, grad: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor | None]:
    grad = grad.contiguous()
    active, grad_gate = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    # Each element is read before it is written, so that the last result can lie where the gradient came in.
    grad_up = grad if up is not None else None
    if gate.numel():
        other, written = (gate, active) if up is None or grad_up is None else (up, grad_up)
        with _on(gate):
            _kernel("gated_backward")[_grid(gate)](
                gate, other, grad, active, grad_gate, written, gate.shape[1],
                gate.stride(0), other.stride(0), grad.stride(0), active.stride(0),
                KIND=activation.name, GATED=up is not None, BLOCK=COLUMNS_AT_ONCE,
            )  # fmt: skip
    return active, grad_gate, grad_up


def _grid(x: Tensor) -> tuple[int, int]:
    # Rows come first: CUDA allows 2**31 - 1 in the first dimension of a grid and 65,535 in the others.
    return x.shape[0], -(-x.shape[1] // COLUMNS_AT_ONCE)


# ---- The base's weight ----


def dequantized(linear: Linear4bit, dtype: torch.dtype) -> Tensor:
    """`ops.dequantized`; its scales, themselves in 8 bits, are unpacked in the same launch."""
    weight: Any = linear.weight
    state = weight.quant_state
    packed = weight.data.reshape(-1).view(torch.uint8)  # under FSDP the bytes are declared as another dtype
    out = WEIGHTS.of(torch.Size(state.shape), dtype, packed.device)
    inner = state.state2 if state.nested else None
    nested = (inner.code, inner.absmax, state.offset) if inner is not None else (state.code, state.absmax, state.absmax)
    with _on(packed):
        _kernel("dequantize")[(-(-packed.numel() // BYTES_AT_ONCE),)](
            packed, out, state.code, state.absmax, *nested, packed.numel(), out.numel(),
            BLOCKSIZE=state.blocksize, NESTED_BLOCKSIZE=0 if inner is None else inner.blocksize,
            BLOCK=BYTES_AT_ONCE,
            enable_fp_fusion=False,  # multiply, round, add, round: as bitsandbytes does it
        )  # fmt: skip
    return out


# ---- Norms ----


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """`norm.rms_norm`."""
    if _norm_is_torchs(x, offset):
        return ONE_KERNEL["rms_norm"](x, weight, eps, offset)
    rows = _dense_rows(x.reshape(-1, x.shape[-1]))  # (M, D)
    y, rstd = x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if rows.numel():
        grid, options = _norm_launch(rows)
        with _on(x):
            _kernel("rms_norm")[grid](
                rows, x if weight is None else weight, y, rstd, *rows.shape, eps, rows.stride(0),
                WEIGHTED=weight is not None, OFFSET=offset, **options,
            )  # fmt: skip
    return y, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float) -> Tensor:
    """`norm.rms_norm_backward`."""
    if _norm_is_torchs(x, offset):
        return ONE_KERNEL["rms_norm_backward"](grad, x, weight, rstd, offset)
    rows, grads = (_dense_rows(t.reshape(-1, t.shape[-1])) for t in (x, grad))
    dx = x.new_empty(x.shape)
    if rows.numel():
        grid, options = _norm_launch(rows)
        with _on(x):
            _kernel("rms_norm_backward")[grid](
                grads, rows, x if weight is None else weight, rstd, dx, *rows.shape, grads.stride(0), rows.stride(0),
                WEIGHTED=weight is not None, OFFSET=offset, **options,
            )  # fmt: skip
    return dx


def _norm_is_torchs(x: Tensor, offset: float) -> bool:
    width = x.shape[-1]
    return width > WIDEST_NORM or (width >= TORCHS_NORM and by_torch(x, offset))


def _norm_launch(rows: Tensor) -> tuple[tuple[int], dict[str, int]]:
    block = _power_of_two(rows.shape[1])
    at_once = max(1, NUMBERS_AT_ONCE // block)
    warps = min(max(block // 512, 4), 16)
    return (-(-rows.shape[0] // at_once),), {"ROWS": at_once, "BLOCK": block, "num_warps": warps}


# ---- Rotary embeddings ----


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """`ops.rotated`; both in one launch."""
    q, k = _dense_rows(q), _dense_rows(k)
    (batch, heads, tokens, width), half = q.shape, q.shape[-1] // 2
    cos, sin = cos.contiguous(), sin.contiguous()
    # In the order of the projections that they come from and of most attention functions: heads of a token together.
    q_out, k_out = (x.new_empty(batch, tokens, x.shape[1], width) for x in (q, k))
    if q.numel():
        block = _power_of_two(half)
        at_once = min(_power_of_two(heads), max(1, NUMBERS_AT_ONCE // block))
        groups = sum(-(-x.shape[1] // at_once) for x in (q, k))
        strides = [x.stride(dim) for x in (q, k) for dim in (0, 2, 1)]
        with _on(q):
            _kernel("rotated")[batch * tokens, groups](
                q, k, q_out, k_out, cos, sin, tokens, heads, k.shape[1], *strides,
                cos.stride(0) if cos.shape[0] > 1 else 0,
                HALF=half, HEADS=at_once, BLOCK=block, BACK=back,
            )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


# ---- Launching ----


@cache
def _kernel(name: str) -> Any:
    from . import kernels  # which imports Triton

    return getattr(kernels, f"{name}_kernel")


def _dense_rows(x: Tensor) -> Tensor:
    """Return ``x`` with neighbors in a row next to each other; in a gradient that was expanded they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _on(x: Tensor) -> AbstractContextManager:
    """Make the device of ``x`` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


OPERATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        dropped, add_dropped_, gated, gated_backward, activated, activated_backward, dequantized,
        rms_norm, rms_norm_backward, rotated,
    )
}  # fmt: skip
