"""Triton's kernels in its interpreter, against the plain operations; prints what differs, as JSON.

A process of its own: Triton reads TRITON_INTERPRET when it is imported. The interpreter truncates where a GPU rounds
to bf16, so that there a unit in the last place may differ.
"""

import json
import sys

import torch

from qlora_neft.fused import ops, triton_ops
from qlora_neft.fused.kernel_check import differences
from qlora_neft.fused.masks import Mask, Places, kept_by_tensors, threshold_of
from qlora_neft.steps.sequences import SequenceSpan

CPU = torch.device("cpu")
ULPS = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}
found: list[str] = []
count = 0


def compare(what, result, expected, *, exact=False):
    global count
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=True)
    for a, b in pairs:
        count += 1
        same = torch.equal(a, b) if exact else torch.allclose(a, b, rtol=ULPS[b.dtype], atol=ULPS[b.dtype])
        if a.dtype != b.dtype or a.shape != b.shape or not same:
            found.append(what)


def strided(rows, columns, dtype):
    """Rows that are part of wider ones, as the halves of a joint projection are."""
    return torch.randn(rows, columns + 24, dtype=torch.float32)[:, 8 : columns + 8].to(dtype)


def a_mask(rows, *, module, p=0.1, step=3, seed=5):
    # Two sequences and a padded tail; the second begins inside, so that positions start anew there.
    first = (rows + 1) // 2
    spans = [SequenceSpan(0, slice(0, first), first, 4)]
    if rows - first > 1:
        spans.append(SequenceSpan(0, slice(first, rows - 1), rows - 1 - first, 5))
    return Mask(Places.of(spans, (1, rows), seed=seed, step=step), module=module, threshold=threshold_of(p))


def main():
    torch.manual_seed(0)
    for name in triton_ops.OPERATIONS:
        for dtype in (torch.float32, torch.bfloat16):
            found.extend(f"{name}: {difference}" for difference in differences(name, CPU, dtype))
    for rows, columns in ((1, 1), (3, 17), (2, 2064)):
        for dtype in ULPS if columns == 17 else (torch.float32, torch.bfloat16):
            size = f"{rows} x {columns} {dtype}"
            x, y, g = (strided(rows, columns, dtype) for _ in range(3))
            # Values of a run that Triton treats apart: 1 and multiples of 16; seeds and steps with high bits.
            for module, seed, step in ((1, 1, 0), (16, 2**32 - 1, 2**20), (7, 2**40, 1)):
                mask = a_mask(rows, module=module, seed=seed, step=step)
                dropped = triton_ops.dropped(x, mask)
                compare(f"dropped {size} {module}", dropped, ops.ONE_KERNEL["dropped"](x, mask), exact=True)
                by_tensors = x * kept_by_tensors(mask, columns, CPU)
                compare(f"tensors {size} {module}", dropped, by_tensors, exact=True)
                total = triton_ops.add_dropped_(y.clone(), x, mask)
                compare(f"add {size} {module}", total, ops.ONE_KERNEL["add_dropped_"](y.clone(), x, mask))
            for name, activation in ops.ACTIVATIONS.items():
                if name != "silu" and columns != 17:
                    continue
                for operation, arguments in {
                    "gated": (x, y), "gated_backward": (x, y, g), "activated": (x,), "activated_backward": (x, g),
                }.items():  # fmt: skip
                    # Copies: a gradient may be overwritten.
                    both = (
                        function(*(t.clone() if t is g else t for t in arguments), activation)
                        for function in (triton_ops.OPERATIONS[operation], ops.ONE_KERNEL[operation])
                    )
                    compare(f"{operation} {name} {size}", *both)
            weight = torch.rand(columns).to(dtype)
            for offset in (0.0, 1.0):
                y1, rstd1 = triton_ops.rms_norm(x, weight, 1e-5, offset)
                y2, rstd2 = ops.ONE_KERNEL["rms_norm"](x, weight, 1e-5, offset)
                compare(f"norm {size}", (y1, rstd1), (y2, rstd2))
                backward = (
                    triton_ops.rms_norm_backward(g, x, weight, rstd2, offset),
                    ops.ONE_KERNEL["rms_norm_backward"](g, x, weight, rstd2, offset),
                )
                compare(f"norm backward {size}", *backward)
    for dtype in ULPS:
        # Widths that fill no power of two, heads that fill no program; keys laid out as a gradient's may be.
        for width, q_heads, k_heads, batch in ((2, 1, 1, 1), (20, 5, 2, 2), (128, 9, 3, 1)):
            q = torch.randn(batch, 3, q_heads, width).to(dtype).transpose(1, 2)
            k = torch.randn(batch, k_heads, 3, width).to(dtype)
            angles = [torch.randn(batch, 3, width).to(dtype) for _ in range(2)]
            for back in (False, True):
                both = (function(q, k, *angles, back) for function in (triton_ops.rotated, ops.ONE_KERNEL["rotated"]))
                compare(f"rotated {width} {dtype}", *both)
    compare("nothing", triton_ops.dropped(x[:0], a_mask(1, module=1)), x[:0])
    print(json.dumps({"found": found, "count": count}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
