"""Calls that are one kernel on CUDA, though torch runs several operations for them on a CPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import FrameType

import torch

# By function and part of its file's name: the norms of `qlora_neft.fused.norm` are torch's kernel or Triton's on CUDA,
# rotary embeddings that are not fused Liger's.
ONE_KERNEL = {
    "rms_norm": "fused/norm.py",
    "rms_norm_backward": "fused/norm.py",
    "apply_rotary_pos_emb": "transformers/models/",
}
DEPTH = 40  # frames from an operation up to such a call, at most


@dataclass
class Region:
    """One such call, forward or backward.

    Attributes:
        name: The function's.
        read: Storages from outside that it has read.
        made: Storages that it has made, and the bytes it wrote to each; nobody outside has read them yet.
    """

    name: str
    read: set[int] = field(default_factory=set)
    made: dict[int, int] = field(default_factory=dict)


class Regions:
    """Finds the call that an operation belongs to: by the Python frames above it, or by its place in the graph."""

    def __init__(self) -> None:
        self._last: tuple[int, int, Region] | None = None  # frame, how far it was, its region
        self._forward: dict[int, Region] = {}  # by the number of the autograd node
        self._backward: dict[int, Region] = {}  # by the id of the forward region

    def current(self, *, makes_node: bool) -> Region | None:
        """Return the call under way, None outside.

        Args:
            makes_node: Whether autograd has just made a node for the operation, which its backward pass is known by.
        """
        region = self._by_frame()
        if region is not None:
            if makes_node and torch.is_grad_enabled():
                self._forward[torch._C._autograd._get_sequence_nr() - 1] = region
            return region
        node = torch._C._current_autograd_node()
        forward = None if node is None else self._forward.get(node._sequence_nr())
        if forward is None:
            return None
        return self._backward.setdefault(id(forward), Region(f"{forward.name}, backward"))

    def _by_frame(self) -> Region | None:
        frame: FrameType | None = sys._getframe(3)
        for _ in range(DEPTH):
            if frame is None:
                return None
            file = ONE_KERNEL.get(frame.f_code.co_name)
            if file is not None and file in frame.f_code.co_filename:
                return self._of(frame)
            frame = frame.f_back
        return None

    def _of(self, frame: FrameType) -> Region:
        # A frame's address is used again; a call that is further back than the last one seen there is a new call.
        if self._last is not None and self._last[0] == id(frame) and frame.f_lasti >= self._last[1]:
            region = self._last[2]
        else:
            region = Region(frame.f_code.co_name)
        self._last = (id(frame), frame.f_lasti, region)
        return region
