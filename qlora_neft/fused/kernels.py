"""The Triton kernels of the fast path; `.triton_ops` calls them. Imported only where Triton is.

Shapes as in `.ops`. Tensors are two-dimensional, heads apart, with neighbors in a row next to each other in memory;
rows may be any distance apart. All arithmetic is in float32, rounded once on the way out. Indices of rows are 64-bit:
M times the width of a row can pass 2**31.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl

# Numbers that differ from call to call and must not compile a kernel of their own when they are 1 or divide by 16.
VARYING = ["seed", "module", "threshold"]


# ---- Dropout ----


@triton.jit
def _kept(position, key, seed, module, threshold, row_blocks, first, GROUPS: tl.constexpr):
    """Whether the elements of one row from block ``first`` on are kept, (GROUPS * 16,). See `.masks`."""
    block = first + tl.arange(0, GROUPS)
    counter = (position.to(tl.int64) * row_blocks + 1 + block).to(tl.uint64)
    zero = counter * 0
    w0, w1, w2, w3 = philox_impl(
        counter, zero, zero + module.to(tl.uint64), zero + 1, zero + seed.to(tl.uint64), zero + key.to(tl.uint64)
    )
    # join(a, b)[..., 0] is a: flattened, the words of a block lie in the order w0 w1 w2 w3.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (GROUPS, 4))
    shifts = (tl.arange(0, 4) * 16).to(tl.uint64)
    bits = ((words[:, :, None] >> shifts[None, None, :]) & 0xFFFF).to(tl.int32)
    return (tl.reshape(bits, (GROUPS * 16,)) >= threshold) & (position >= 0)  # position -1: padding


@triton.jit(do_not_specialize=VARYING)
def dropped_kernel(
    x, out, positions, keys, seed, module, threshold, columns, row_blocks, x_row, out_row,
    ADD: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``out = dropped(x)``, or ``out += dropped(x)``. Grid: rows, groups of 16 columns by GROUPS."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * GROUPS
    kept = _kept(
        tl.load(positions + row), tl.load(keys + row), seed, module, threshold, row_blocks, first, GROUPS
    )  # fmt: skip
    column = first * 16 + tl.arange(0, GROUPS * 16)
    inside = column < columns
    # Chosen after the load: a mask that differs from element to element would make it load them one by one.
    value = tl.where(kept, tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32), 0.0)
    target = out + row * out_row + column
    if ADD:
        value += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, value.to(out.dtype.element_ty), mask=inside)


# ---- Activations ----


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """Return an activation of float32 numbers, and its derivative."""
    if KIND == "silu":
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    elif KIND == "gelu":
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))  # the normal distribution function, then its density
        return x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = 2 * tl.sigmoid(2 * inner) - 1  # tanh, without a library call
        slope = 0.7978845608028654 * (1 + 0.134145 * x * x)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope
    else:
        tl.static_assert(KIND == "relu")
        return tl.maximum(x, 0.0), (x > 0).to(tl.float32)


@triton.jit
def gated_kernel(gate, up, out, columns, gate_row, up_row, out_row, KIND: tl.constexpr, GATED: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """``out = activation(gate) * up``; without ``up`` if not GATED. Grid: rows, columns by BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    active, _ = _activation(tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        active *= tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column, active.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(
    gate, up, grad, out, grad_gate, grad_up, columns, gate_row, up_row, grad_row, out_row,
    KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The forward result again, and both gradients; the three results have rows ``out_row`` apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    active, slope = _activation(tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32), KIND)
    g = tl.load(grad + row * grad_row + column, mask=inside, other=0.0).to(tl.float32)
    target = row * out_row + column
    if GATED:
        u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_up + target, (g * active).to(grad_up.dtype.element_ty), mask=inside)
        active *= u
        g *= u
    tl.store(out + target, active.to(out.dtype.element_ty), mask=inside)
    tl.store(grad_gate + target, (g * slope).to(grad_gate.dtype.element_ty), mask=inside)


# ---- The base's weight ----


@triton.jit
def dequantize_kernel(
    packed, out, code, absmax, nested_code, nested_absmax, offset, num_packed, num_out,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """4-bit numbers, two a byte and the high one first, times the scale of their block. Grid: bytes by BLOCK.

    With NESTED_BLOCKSIZE the scales are themselves 8-bit numbers with a scale for each block of them.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = start + tl.arange(0, BLOCK)
    inside = byte < num_packed
    pair = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    block = byte * 2 // BLOCKSIZE
    if NESTED_BLOCKSIZE > 0:
        index = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        larger = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=inside, other=0.0)
        scale = tl.load(nested_code + index) * larger + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    values = tl.join(tl.load(code + (pair >> 4)) * scale, tl.load(code + (pair & 15)) * scale)  # (BLOCK, 2)
    values = tl.reshape(values, (BLOCK * 2,))
    index = start * 2 + tl.arange(0, BLOCK * 2)
    tl.store(out + index, values.to(out.dtype.element_ty), mask=index < num_out)


# ---- Norms ----


@triton.jit(do_not_specialize=["eps"])
def rms_norm_kernel(
    x, weight, y, rstd, rows, columns, eps, x_row,
    WEIGHTED: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y = x * rstd * (OFFSET + weight)``; ``y`` is contiguous. Grid: rows by ROWS."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / columns + eps)  # (ROWS, 1)
    result = value * scale
    if WEIGHTED:
        result *= OFFSET + tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, result.to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def rms_norm_backward_kernel(
    grad, x, weight, rstd, dx, rows, columns, grad_row, x_row,
    WEIGHTED: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of ``x``; ``dx`` is contiguous. Grid: rows by ROWS."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_row + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row, mask=row < rows, other=0.0)
    if WEIGHTED:
        g *= OFFSET + tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    mean = tl.sum(g * value, axis=1, keep_dims=True) / columns
    result = scale * (g - value * (scale * scale * mean))
    tl.store(dx + row * columns + column, result.to(dx.dtype.element_ty), mask=inside)


# ---- Rotary embeddings ----


@triton.jit
def _rotate_heads(x, out, cos, sin, row, at, angle, heads, first, x_head,
                  HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """Turn heads ``first`` to ``first + HEADS`` of one token, whose first number is at ``at``."""
    head = first + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (column < HALF)
    source = x + at + head * x_head + column
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    cos1 = tl.load(cos + angle + column, mask=column < HALF, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angle + column, mask=column < HALF, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + angle + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    if BACK:
        y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    target = out + (row * heads + head) * (2 * HALF) + column
    tl.store(target, y1.to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, y2.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotated_kernel(
    q, k, q_out, k_out, cos, sin, tokens, q_heads, k_heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head, angle_batch,
    HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Heads of queries, then of keys; results are (B, T, H, D), contiguous. Grid: tokens, heads by HEADS."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    batch, token = row // tokens, row % tokens
    angle = batch * angle_batch + token * (2 * HALF)
    q_groups = tl.cdiv(q_heads, HEADS)
    if group < q_groups:
        _rotate_heads(q, q_out, cos, sin, row, batch * q_batch + token * q_token, angle, q_heads, group * HEADS,
                      q_head, HALF, HEADS, BLOCK, BACK)  # fmt: skip
    else:
        _rotate_heads(k, k_out, cos, sin, row, batch * k_batch + token * k_token, angle, k_heads,
                      (group - q_groups) * HEADS, k_head, HALF, HEADS, BLOCK, BACK)  # fmt: skip
