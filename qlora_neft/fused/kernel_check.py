"""Which operations of the fast path run as Triton kernels: those that were seen to compute what they should.

On CUDA each is compared with its plain version once a process, on small tensors, before it is used. One that does not
compile here, or computes something else, stays out, and one line says so.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from ..errors import UserInputError
from ..steps.sequences import SequenceSpan
from . import ops
from .masks import Mask, Places, threshold_of
from .triton_ops import OPERATIONS

EXACT = ("dropped",)  # masks are integers, and dropping rounds nothing
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest number expected


def use_kernels(device: torch.device, dtype: torch.dtype, asked: bool | None = None) -> str:
    """Use Triton's kernels on CUDA from now on, or the plain operations; return a line for the user.

    Args:
        device: Device of the model.
        dtype: The dtype that it computes in, and in which the kernels are compared.
        asked: None uses them where they run; False never.

    Raises:
        UserInputError: If they are insisted on where they cannot run.
    """
    reason = why_not(device)
    if asked and reason:
        raise UserInputError(f"use_triton_kernels: {reason}, got true. Use auto.")
    use = not reason and asked is not False
    failed = failures(device, dtype) if use else {}
    for name, function in OPERATIONS.items():
        ops.register(name, "cuda", function if use and name not in failed else None)
    if not use:
        return f"kernels: plain operations ({reason or 'use_triton_kernels is false'})"
    if failed:
        named = "; ".join(f"{name}: {why}" for name, why in failed.items())
        return f"kernels: Triton's, but plain operations where the check on this device failed ({named})"
    return "kernels: Triton's, each checked against its plain version on this device"


def why_not(device: torch.device) -> str:
    """Return why no kernel can run on a device; empty if they may."""
    if device.type != "cuda":
        return f"Triton's kernels need a CUDA device, and the model is on {device.type}"
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


@cache
def failures(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return the operations that do not compute on a device what their plain versions do, and why.

    Some twenty small kernels are compiled for it, most of which the run needs anyway; Triton keeps them on disk.
    """
    from triton.errors import TritonError

    # Without a compiler or driver it is an OSError or a failed process; a GPU that is too old is a TritonError; another
    # Triton than these were written for may raise anything that a call with wrong arguments does.
    kinds = (TritonError, RuntimeError, OSError, subprocess.SubprocessError, ImportError)
    kinds += (ValueError, TypeError, LookupError, AttributeError, AssertionError)
    failed = {}
    for name in OPERATIONS:
        try:
            wrong = list(differences(name, device, dtype))
        except kinds as error:
            lines = str(error).strip().splitlines() or [""]
            failed[name] = f"{type(error).__name__} {lines[-1][:200]}"
        else:
            if wrong:
                failed[name] = wrong[0]
    return failed


# ---- The comparison ----


def differences(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Yield where a kernel on a device and the plain version on the CPU differ beyond rounding, in words."""
    for arguments in _cases(name, dtype):
        found = _tensors(OPERATIONS[name](*_copied(arguments, device)))
        expected = _tensors(ops.ONE_KERNEL[name](*_copied(arguments, torch.device("cpu"))))
        for a, b in zip(found, expected, strict=True):
            limit = 0.0 if name in EXACT else TOLERANCE[dtype] * b.double().abs().max().item()
            # Not a plain ">": NaN is a difference too.
            if a.dtype != b.dtype or not (a.cpu().double() - b.double()).abs().max().item() <= limit:
                yield f"another result in {str(dtype).removeprefix('torch.')}"


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Copies: a dequantized weight lies in memory that the next one takes over.
    return tuple(t.clone() for t in ((result,) if isinstance(result, Tensor) else result))


def _copied(arguments: tuple, device: torch.device) -> tuple:
    """Copy tensors and layers to a device: operations write into what they are given."""
    copies: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Linear4bit):
            argument = argument.to(device)
        elif isinstance(argument, Tensor):
            argument = argument.to(device, copy=True)
        copies.append(argument)
    return tuple(copies)


def _cases(name: str, dtype: torch.dtype) -> Iterator[tuple]:
    """Yield small arguments of an operation: more than one program's worth, and sizes that fill none."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows, columns = 5, 2072
    x = numbers(rows, columns)
    if name in ("dropped", "add_dropped_"):
        # Two sequences, the second at the end of a padded row, and a step whose key has high bits.
        spans = [SequenceSpan(0, slice(0, 3), 3, 0), SequenceSpan(0, slice(4, 5), 1, 1)]
        mask = Mask(Places.of(spans, (1, rows), seed=2**40 + 1, step=7), module=3, threshold=threshold_of(0.1))
        yield (x, mask) if name == "dropped" else (numbers(rows, columns), x, mask)
    elif name == "dequantized":
        for nested in (True, False):
            yield _quantized(dtype, nested=nested), dtype
    elif name.startswith("rms_norm"):
        # Wide rows without an offset are torch's own kernel where it has one, tried in `.norm`.
        for width, offset, weight in ((columns, 1.0, numbers(columns)), (48, 0.0, numbers(48)), (48, 0.0, None)):
            part = x[:, :width].contiguous()
            rstd = part.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
            yield (part, weight, 1e-6, offset) if name == "rms_norm" else (part.flip(0), part, weight, rstd, offset)
    elif name == "rotated":
        # Heads as projections give them, fewer keys than queries, and angles of each row or of all.
        q, k = (numbers(2, 5, heads, 48).transpose(1, 2) for heads in (3, 1))
        for count, back in ((2, False), (1, True)):
            yield q, k, numbers(count, 5, 48), numbers(count, 5, 48), back
    else:
        # Those that families have with and without a gate; the interpreter's test has them all.
        for kind in ("silu", "gelu_tanh") if name.startswith("gated") else ("gelu", "relu"):
            activation = ops.ACTIVATIONS[kind]
            extra = (numbers(rows, columns),) if name.startswith("gated") else ()
            grad = (numbers(rows, columns),) if name.endswith("backward") else ()
            yield (x, *extra, *grad, activation)


def _quantized(dtype: torch.dtype, *, nested: bool) -> Linear4bit:
    # Rows of whole blocks: of others, bitsandbytes 0.50 gives something else on a CPU than it has quantized.
    layer = Linear4bit(
        128, 150, bias=False, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4", device="cpu"
    )
    layer.weight.data = torch.randn(150, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    return layer.to("cpu")  # which quantizes it
