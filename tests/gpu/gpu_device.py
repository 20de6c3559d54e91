"""The device of these tests: CUDA; a CPU only to rehearse them, with QLORA_NEFT_GPU_TESTS_ON=cpu."""

from __future__ import annotations

import os

import pytest
import torch

REHEARSED = os.environ.get("QLORA_NEFT_GPU_TESTS_ON") == "cpu"
DEVICE = torch.device("cpu" if REHEARSED else "cuda")
# float32 on the GPU shows the invariants without bf16's rounding; the formats themselves are tested as well.
ON_DEVICE = {"use_cpu": REHEARSED, "bf16": False, "optim": "adamw_torch"}
if REHEARSED:  # what is the default with CUDA
    ON_DEVICE |= {"padding_free": True, "gradient_checkpointing": True}

needs_device = pytest.mark.skipif(not (REHEARSED or torch.cuda.is_available()), reason="needs a CUDA device")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_bf16 = pytest.mark.skipif(
    not (REHEARSED or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))),
    reason="needs compute capability 8.0",
)
