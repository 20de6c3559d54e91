"""What a card does at its best: one large matrix product and one large copy, timed for a moment each."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from .meters import synchronize

SIDE, COPIED = 8192, 4 * 2**30  # of the matrices; bytes that a copy reads
REPEATS = 10


def probe(device: torch.device, *, tiny: bool = False) -> dict[str, Any]:
    """Return the device, and its ceilings."""
    side, copied = (128, 2**20) if tiny else (SIDE, COPIED)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Random values: a card multiplies zeros faster.
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randint(256, (copied,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = _seconds(lambda: torch.mm(left, right), device)
    copy = _seconds(lambda: target.copy_(source), device)
    return {
        "device": _name(device),
        "flops": 2 * side**3 / product,
        "bandwidth": 2 * copied / copy,
        **_card(device),
    }


def _seconds(what: Any, device: torch.device) -> float:
    """Return the median time of several calls, after three that are not counted."""
    times = []
    for index in range(3 + REPEATS):
        synchronize(device)
        began = time.perf_counter()
        what()
        synchronize(device)
        if index >= 3:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "memory_bytes": properties.total_memory,
        # What is taken beyond the allocator's own: no other session is on the card yet.
        "context_bytes": max(total - free - torch.cuda.memory_reserved(device), 0),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
