"""Random streams that nothing outside a training step can shift.

Dropout is a function of (seed, optimizer step, micro-batch), as the noise is in `philox`: nothing to save or restore.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_key(name: str, *parts: int) -> int:
    """Hash a stream's name and its coordinates into a generator seed in [0, 2**63).

    The key is hashed, not packed, because torch's CPU generators read only the low 32 bits of a seed.
    """
    text = ":".join([name, *(str(part) for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def keyed_rng(key: int, device: torch.device) -> Iterator[None]:
    """Run a block (dropout, that is) on torch's global generators seeded with ``key``; put them back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            torch.cuda.manual_seed(key)
        yield


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's global random streams as they were before the block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
