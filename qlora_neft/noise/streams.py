"""Random numbers that are a function of a key alone, the same on every CPU and every GPU, bit for bit.

Noise is drawn by Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which maps a
128-bit key and a counter to 256 random bits. On a CPU NumPy's implementation draws them; elsewhere the same integers
are computed with tensor operations. torch's own generators give other numbers on a CPU than on a GPU, and may give
others on another GPU; then where a run happens would change what it learns.

The adapters' dropout is drawn the same way (`qlora_neft.fused.masks`). A base model's own dropout is torch's and cannot
be: its global generators are seeded by a key for the length of a block.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

Key = tuple[int, int]
Stream = tuple[int, int, int]  # the upper three words of a counter; its first word counts blocks

ROUNDS = 10
FLOATS_PER_BLOCK = 8  # 256 bits, 32 for each
SIXTEENS_PER_BLOCK = 16
FLOATS_AT_ONCE = 2**22  # by tensor operations; about 16 int64 words of scratch for every 8 of them: 64 MiB
_LOW = 0xFFFFFFFF
# Multipliers and Weyl constants of Philox4x64, as signed 64-bit integers where torch needs them.
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_UNIT = 2.0**-24  # 24 random bits make a float32 in [0, 1)


# ---- Draws by key ----


def uniform_draws(counts: Sequence[int], keys: Sequence[Key], device: torch.device) -> Iterator[Tensor]:
    """Draw from Uniform[0, 1), 24 random bits a number, once per key.

    Args:
        counts: How many numbers to draw for each key.
        keys: Two integers in [0, 2**64) each.
        device: Device of the result.

    Yields:
        float32 tensors (count,), the caller's to change and valid until the next one is asked for.
    """
    if device.type == "cpu":
        buffer = torch.empty(max(counts, default=0), dtype=torch.float32)
        for count, key in zip(counts, keys, strict=True):
            bits = np.random.Philox(key=np.array(key, dtype=np.uint64))
            np.random.Generator(bits).random(dtype=np.float32, out=buffer[:count].numpy())
            yield buffer[:count]
        return
    for part in _parts(counts):
        yield from uniform_by_tensors(counts[part], keys[part], device)


def normal_draws(counts: Sequence[int], keys: Sequence[Key], device: torch.device) -> Iterator[Tensor]:
    """Draw from N(0, 1) by the Box-Muller transform; otherwise as `uniform_draws`. Devices agree up to rounding."""
    pairs = [-(-count // 2) for count in counts]
    draws = uniform_draws([2 * n for n in pairs], keys, device)
    for count, n, uniform in zip(counts, pairs, draws, strict=True):
        radius = (-2 * (1 - uniform[:n]).log()).sqrt()  # 1 - u is in (0, 1]: the logarithm is finite
        angle = 2 * torch.pi * uniform[n:]
        # Both numbers of each pair are used; an odd count drops the last.
        yield torch.cat((radius * angle.cos(), radius * angle.sin()))[:count]


def uniform_by_tensors(counts: Sequence[int], keys: Sequence[Key], device: torch.device) -> list[Tensor]:
    """Compute what `uniform_draws` yields, all at once, with integer tensor operations on any device."""
    blocks = [-(-count // FLOATS_PER_BLOCK) for count in counts]
    # NumPy counts up before its first block, so counters begin at 1.
    counter = torch.cat([torch.arange(1, n + 1, device=device) for n in blocks])  # (N,), N blocks in all
    # Nothing here waits for the device: copies to it go on by themselves, and sizes are known beforehand.
    repeats = torch.tensor(blocks).to(device, non_blocking=True)
    words = torch.tensor([[_signed(word) for word in key] for key in keys]).to(device, non_blocking=True)  # (K, 2)
    k0, k1 = words.repeat_interleave(repeats, dim=0, output_size=sum(blocks)).unbind(dim=1)
    raw = torch.stack(_philox(counter, k0, k1), dim=1)  # (N, 4) 64-bit words in the order they are handed out
    halves = torch.stack((raw & _LOW, (raw >> 32) & _LOW), dim=2).view(-1)  # (8 N,); the low half comes first
    # As NumPy does: the upper 24 of 32 bits, as many as a float32 holds exactly.
    uniform = (halves >> 8).to(torch.float32) * _UNIT
    rows = uniform.split([n * FLOATS_PER_BLOCK for n in blocks])
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


def sixteens(count: int, key: Key, stream: Stream) -> np.ndarray:
    """Draw integers of 16 random bits by NumPy.

    Args:
        count: How many, a multiple of 16.
        key: Two integers in [0, 2**64).
        stream: The upper three words of the counter; blocks count from 1 in the first.

    Returns:
        uint16 (count,), the four of each 64-bit word from its low bits up.
    """
    bits = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array((0, *stream), dtype=np.uint64))
    return bits.random_raw(count // 4).astype("<u8", copy=False).view("<u2")


def sixteens_by_tensors(counter: Tensor, key: tuple[int | Tensor, int | Tensor], stream: Stream) -> Tensor:
    """Compute what `sixteens` draws, by integer tensor operations on any device.

    Args:
        counter: First words of the counters, int64 of any shape.
        key: Two words, integers or int64 tensors that broadcast with ``counter``.
        stream: The upper three words.

    Returns:
        int64 (..., 16), one row for each counter.
    """
    k0, k1 = (
        torch.full_like(counter, _signed(k)) if isinstance(k, int) else k.expand_as(counter).contiguous() for k in key
    )
    words = torch.stack(_philox(counter, k0, k1, stream), dim=-1)  # (..., 4)
    shifts = torch.arange(0, 64, 16, device=counter.device)
    return ((words[..., None] >> shifts) & 0xFFFF).flatten(-2)


def _parts(counts: Sequence[int]) -> Iterator[slice]:
    """Yield runs of neighbors whose scratch memory stays bounded: few kernel launches, and no burst of memory."""
    start, size = 0, 0
    for i, count in enumerate(counts):
        # One sequence larger than the limit still gets a part of its own.
        if i > start and size + count > FLOATS_AT_ONCE:
            yield slice(start, i)
            start, size = i, 0
        size += count
    if start < len(counts):
        yield slice(start, len(counts))


def _philox(
    counter: Tensor, k0: Tensor, k1: Tensor, stream: Stream = (0, 0, 0)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, (b, c, d) = counter, (torch.full_like(counter, _signed(word)) for word in stream)
    for _ in range(ROUNDS):
        # One round: each product's low word passes on, its high word is mixed with a neighbor and the key;
        # then the key is bumped by the Weyl constants.
        high0, low0 = _multiply(a, _MULTIPLIERS[0])
        high1, low1 = _multiply(c, _MULTIPLIERS[1])
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = k0 + _signed(_WEYL[0]), k1 + _signed(_WEYL[1])
    return a, b, c, d


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Return high and low 64 bits of an unsigned product; int64 tensors hold the bits, products wrap around."""
    # Long multiplication by halves of 32 bits, as int64 has no wider product. A shift of int64 copies the sign bit,
    # hence the mask after each.
    x0, x1 = x & _LOW, (x >> 32) & _LOW
    c0, c1 = constant & _LOW, constant >> 32
    low, cross = x0 * c0, x1 * c0
    middle = cross + ((low >> 32) & _LOW)  # cannot exceed 64 bits
    other = (middle & _LOW) + x0 * c1
    high = x1 * c1 + ((middle >> 32) & _LOW) + ((other >> 32) & _LOW)
    return high, x * _signed(constant)


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit integer."""
    return word - 2**64 if word >= 2**63 else word


# ---- torch's, NumPy's and Python's global streams ----


def stream_key(name: str, *parts: int) -> int:
    """Hash a stream's name and its coordinates into a generator seed in [0, 2**63).

    The key is hashed, not packed, because torch's CPU generators read only the low 32 bits of a seed.
    """
    text = ":".join([name, *(str(part) for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def keyed_rng(key: int, device: torch.device) -> Generator[None, None, None]:
    """Run a block, such as a forward pass with dropout, on torch's global generators seeded with ``key``.

    Afterwards the generators are where they were before.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed: it also seeds devices that fork_rng does not put back.
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            torch.cuda.manual_seed(key)
        yield


@contextmanager
def preserved_rng() -> Generator[None, None, None]:
    """Leave Python's, NumPy's and torch's global random streams as they were before the block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
