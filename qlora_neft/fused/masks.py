"""Dropout that belongs to the sequence: which elements of an adapter's input are kept, from a key alone.

The mask of a module for a sequence is a function of (seed, optimizer step, ordinal, module, position), as NEFTune's
noise is: the same whatever its batch-mates, padding, micro-batch, ranks or checkpointing. So it need not be kept for
the backward pass, which draws it again.

Random bits come from Philox4x64-10 (`qlora_neft.noise.streams`), keyed like the noise by (seed, step << 32 | ordinal).
Counter words are (block, 0, module, 1); the noise's are (block, 0, 0, 0), so the two never meet. A block is four words
of 64 bits, or sixteen numbers of 16 bits, the low bits first. Position t of a sequence starts at block
t * ceil(features / 16) + 1, and an element is kept if its number is at least round(p * 65536). All integers: NumPy on
a CPU, tensor operations and Triton elsewhere give the same mask, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..noise.streams import SIXTEENS_PER_BLOCK, sixteens, sixteens_by_tensors
from ..steps.sequences import SequenceSpan

LEVELS = 2**16  # 16 random bits an element: p is exact to 1 / 65536
MASK_STREAM = 1  # the last counter word; the noise's is 0
# The number one as NumPy has it; it has no bfloat16, of which these are the bits.
_ONE: dict[torch.dtype, Any] = {
    torch.float64: np.float64(1),
    torch.float32: np.float32(1),
    torch.float16: np.float16(1),
    torch.bfloat16: np.int16(0x3F80),
}


@dataclass(frozen=True, eq=False)
class Run:
    """One sequence in a flattened micro-batch: the flat indices of its tokens, their number, and its ordinal."""

    tokens: slice | Tensor
    length: int
    ordinal: int


@dataclass(frozen=True, eq=False)  # micro-batches are told apart by identity
class Places:
    """Where each token of a micro-batch stands: in which sequence, and at which position of it.

    Attributes:
        runs: The sequences. Tokens of none are padding.
        num_tokens: B * T, padding included.
        seed: Seed of the run.
        step: Optimizer step, 0-based.
    """

    runs: tuple[Run, ...]
    num_tokens: int
    seed: int
    step: int
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, spans: Sequence[SequenceSpan], shape: Sequence[int], seed: int, step: int) -> Places:
        """Return the places of a micro-batch of (B, T) token ids."""
        rows, width = shape
        return cls(tuple(_run(span, width) for span in spans), rows * width, seed, step)

    def key(self, ordinal: int) -> tuple[int, int]:
        """Return a sequence's key, the one that its noise has."""
        return self.seed, (self.step << 32) | ordinal

    def table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return position (M,), int32, -1 for padding, and second key word (M,), int64, of every token.

        Made once for a micro-batch and device; everything that draws there shares it.
        """
        if device not in self._tables:
            positions = torch.full((self.num_tokens,), -1, dtype=torch.int32)
            keys = torch.zeros(self.num_tokens, dtype=torch.int64)
            for run in self.runs:
                positions[run.tokens] = torch.arange(run.length, dtype=torch.int32)
                keys[run.tokens] = self.key(run.ordinal)[1]
            both = positions.to(device, non_blocking=True), keys.to(device, non_blocking=True)
            self._tables[device] = both
        return self._tables[device]


@dataclass(frozen=True)
class Mask:
    """Which elements of one module's input, (M, features), are kept.

    Attributes:
        places: The tokens it is for.
        module: Number of the module.
        threshold: An element is kept if its 16 random bits are at least this.
    """

    places: Places
    module: int
    threshold: int

    def kept(self, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return 1 where an element is kept and 0 where it is not, (M, features); padding keeps nothing.

        The last one is remembered, since a backward pass reads a mask twice. It is valid until another is asked for,
        and not to be changed.
        """
        return _LAST.kept(self, features, dtype, device)


def threshold_of(p: float) -> int:
    """Return the threshold that drops an element with probability ``p``, to within 1 / 131072."""
    return round(p * LEVELS)


def keep_rate(threshold: int) -> float:
    """Return the probability that an element is kept: kept elements are divided by it."""
    return 1 - threshold / LEVELS


def kept_by_numpy(mask: Mask, features: int, out: np.ndarray) -> None:
    """Write a mask, (M, features) booleans, on the CPU."""
    width = -(-features // SIXTEENS_PER_BLOCK) * SIXTEENS_PER_BLOCK  # a row of numbers fills its last block
    covered = sum(run.length for run in mask.places.runs)
    if covered < mask.places.num_tokens:
        out.fill(False)
    for run in mask.places.runs:
        key = mask.places.key(run.ordinal)
        bits = sixteens(run.length * width, key, (0, mask.module, MASK_STREAM)).reshape(run.length, width)[:, :features]
        if isinstance(run.tokens, slice):
            np.greater_equal(bits, mask.threshold, out=out[run.tokens])
        else:
            out[run.tokens.numpy()] = bits >= mask.threshold


def kept_by_tensors(mask: Mask, features: int, device: torch.device) -> Tensor:
    """Return a mask, (M, features) booleans, by integer tensor operations on any device."""
    positions, keys = mask.places.table(device)
    blocks = -(-features // SIXTEENS_PER_BLOCK)
    first = positions.to(torch.int64) * blocks + 1  # (M,)
    counter = first[:, None] + torch.arange(blocks, device=device)  # (M, blocks)
    bits = sixteens_by_tensors(counter, (mask.places.seed, keys[:, None]), (0, mask.module, MASK_STREAM))
    return (bits.view(len(positions), -1)[:, :features] >= mask.threshold) & (positions >= 0)[:, None]


class _Last:
    """The last mask made, in memory that the next one takes over."""

    def __init__(self) -> None:
        self._what: tuple | None = None
        self._kept: Tensor | None = None
        self._bools = np.empty(0, dtype=bool)
        self._memory: dict[torch.dtype, tuple[np.ndarray, Tensor]] = {}  # one memory, seen by both

    def kept(self, mask: Mask, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        what = (mask, features, dtype, device)
        if self._kept is None or what != self._what:
            self._kept = self._made(mask, features, dtype, device)
            self._what = what
        return self._kept

    def _made(self, mask: Mask, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return kept_by_tensors(mask, features, device).to(dtype)
        shape, size = (mask.places.num_tokens, features), mask.places.num_tokens * features
        if self._bools.size < size:
            self._bools = np.empty(size, dtype=bool)
        bools = self._bools[:size].reshape(shape)
        kept_by_numpy(mask, features, bools)
        one = _ONE[dtype]
        if dtype not in self._memory or self._memory[dtype][1].numel() < size:
            words = np.empty(size, dtype=one.dtype)
            self._memory[dtype] = words, torch.from_numpy(words).view(dtype)
        words, kept = self._memory[dtype]
        # Numbers and not booleans: torch multiplies tensors of one dtype ten times as fast on a CPU.
        into = words[:size].reshape(shape)
        if one == 1:
            np.copyto(into, bools)  # several times as fast as the product
        else:
            np.multiply(bools, one, out=into)
        return kept[:size].view(shape)

    def forget(self) -> None:
        """Let go of the micro-batch; the memory stays."""
        self._what = self._kept = None


_LAST = _Last()
forget_last_mask = _LAST.forget


def _run(span: SequenceSpan, width: int) -> Run:
    offset = span.row * width
    if isinstance(span.tokens, slice):
        return Run(slice(offset + span.tokens.start, offset + span.tokens.stop), span.length, span.ordinal)
    return Run(offset + span.tokens, span.length, span.ordinal)
