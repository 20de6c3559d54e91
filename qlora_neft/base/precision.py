"""The number formats a machine computes in, decided by what its hardware can do.

One policy for the whole project: nothing else asks what a device supports. It changes the rounding, never the
mathematics that a recipe states.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserInputError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
MIN_BF16_CAPABILITY = (8, 0)  # Ampere: the first with bf16 tensor cores
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class PrecisionPolicy:
    """How one device computes.

    Attributes:
        device: Device of the model.
        compute_dtype: Dtype that NF4 weights are dequantized to and that unquantized base weights (embeddings, norms,
            head) are stored in.
        lora_dtype: Dtype that LoRA weights and their optimizer states are stored in.
        amp: Autocast format, ``"bf16"``, ``"fp16"`` or ``"no"``.
        gradient_scaler: Whether the loss is scaled so that fp16 gradients do not underflow.
        reason: One sentence for the user.
    """

    device: torch.device
    compute_dtype: torch.dtype
    lora_dtype: torch.dtype
    amp: str
    gradient_scaler: bool
    reason: str

    def __str__(self) -> str:
        name = str(self.compute_dtype).removeprefix("torch.")
        scaler = " with a gradient scaler" if self.gradient_scaler else ""
        return f"precision: {name} compute{scaler}, float32 LoRA on {self.device} ({self.reason})"


def resolve_precision(
    precision: str = "auto", device: str | torch.device | None = None, compute_dtype: str = "auto"
) -> PrecisionPolicy:
    """Choose the number formats for a device.

    Args:
        precision: ``"auto"`` decides by capability; ``"bf16"``, ``"fp16"`` or ``"fp32"`` insists on one.
        device: Device to run on. Default: the current CUDA device if there is one, else the CPU.
        compute_dtype: ``"auto"`` follows ``precision``; ``"bfloat16"``, ``"float16"`` or ``"float32"`` fixes the dtype
            that NF4 weights are dequantized to (``bnb_4bit_compute_dtype``).

    Returns:
        The policy; LoRA weights are float32 in every one.

    Raises:
        UserInputError: If the device cannot compute in the format asked for.
    """
    if precision not in PRECISIONS:
        raise UserInputError(f"precision: must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    target = _resolve_device(device)
    chosen, reason = (
        _by_capability(target) if precision == "auto" else (precision, f"precision={precision} was asked for")
    )
    _refuse_unsupported(chosen, target, "precision")
    # The format of the products may differ from autocast's, so it is checked by itself.
    if compute_dtype == "bfloat16":
        _refuse_unsupported("bf16", target, "bnb_4bit_compute_dtype")
    dtype = _DTYPES[chosen] if compute_dtype == "auto" else getattr(torch, compute_dtype)
    return PrecisionPolicy(
        device=target,
        compute_dtype=dtype,
        lora_dtype=torch.float32,
        amp="no" if chosen == "fp32" else chosen,
        gradient_scaler=chosen == "fp16",
        reason=reason,
    )


def _resolve_device(device: str | torch.device | None) -> torch.device:
    if device is None or device == "auto":
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UserInputError(f"device: {target} was asked for, but torch sees no CUDA device. Run `qlora-neft doctor`.")
    return target


def _by_capability(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        # Not torch.cuda.is_bf16_supported(): it is True on a T4, where bf16 is emulated and crawls.
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        if (major, minor) >= MIN_BF16_CAPABILITY:
            return "bf16", f"{name}, compute capability {major}.{minor} >= 8.0"
        return "fp16", f"{name}, compute capability {major}.{minor} < 8.0 has no bf16 tensor cores"
    if device.type == "cpu":
        if cpu_has_bf16_matrix_unit():
            return "bf16", "this CPU has bf16 matrix units (AMX)"
        return "fp32", "this CPU has no bf16 matrix units"
    return "fp32", f"no half-precision rule for {device.type} devices"


def cpu_has_bf16_matrix_unit() -> bool:
    """Return whether the CPU multiplies bf16 matrices in hardware (AMX-BF16).

    AVX512-BF16 alone does not count: its matrix products are 4 to 5 times faster than float32's, but a whole training
    step only 1.2 times (measured on a Zen 5 core), which is not worth bf16's rounding. AMX itself: not measured.
    """
    cpuinfo = Path("/proc/cpuinfo")  # Linux only; elsewhere the answer is "no", which is always correct, if slower
    return cpuinfo.exists() and " amx_bf16" in cpuinfo.read_text(encoding="utf-8", errors="replace")


def _refuse_unsupported(precision: str, device: torch.device, key: str) -> None:
    if device.type == "cuda" and precision == "bf16":
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_BF16_CAPABILITY:
            raise UserInputError(
                f"{key}: bf16 needs compute capability >= 8.0, {torch.cuda.get_device_name(device)} has "
                f"{capability[0]}.{capability[1]} and would emulate it. Use auto (fp16 here) or fp16."
            )
    if device.type == "cpu" and precision == "fp16":
        raise UserInputError("precision: fp16 training needs a CUDA device, this run is on the CPU. Use auto or fp32.")
