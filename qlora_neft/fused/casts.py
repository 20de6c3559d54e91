"""The adapters' weights in the dtype of the products: made once an optimizer step, not once a layer and pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .under_way import UnderWay


class Casts:
    """Copies of float32 weights in another dtype, all refreshed together at the first use in a training step.

    Args:
        under_way: Counts the training steps. A tensor's version counter would not do: some optimizers write to weights
            without raising it.
    """

    def __init__(self, under_way: UnderWay) -> None:
        self._under_way = under_way
        self._copies: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}  # by id: the weight and its copy
        self._used: set[tuple[int, torch.dtype]] = set()
        self._fresh_for = -1

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight in ``dtype``, to be read until the step ends."""
        if weight.dtype == dtype:
            return weight.detach()
        if self._fresh_for != self._under_way.passes:
            self._refresh()
        key = (id(weight), dtype)
        self._used.add(key)
        found = self._copies.get(key)
        if found is None or found[1].device != weight.device:
            found = self._copies[key] = (weight, weight.detach().to(dtype))
        return found[1]

    @torch.no_grad()
    def _refresh(self) -> None:
        # What the last step had no use for, such as a deleted adapter, goes.
        kept = {k: v for k, v in self._copies.items() if k in self._used and v[0].device == v[1].device}
        self._copies, self._used, self._fresh_for = kept, set(), self._under_way.passes
        if kept:
            weights, copies = zip(*kept.values(), strict=True)
            torch._foreach_copy_(copies, weights)  # one launch for the lot
