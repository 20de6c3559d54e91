"""Dropout on the inputs of fused experts, keyed as that of linear layers is (`.masks`).

A token has as many streams at a layer as experts it goes to: element i of its slot s is number s * features + i, so the
mask depends on the token and on what the router chose for it, not on who else is in the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..base.expert_lora import ParamWrapper
from ..base.experts import Pairs
from .masks import Mask, keep_rate, threshold_of
from .under_way import UnderWay

FIRST = 1 << 32  # numbers of experts' modules begin here, out of the reach of those of linear layers


@dataclass(frozen=True)
class ExpertDropout:
    """Makes the dropout masks of one adapted stack of experts.

    Attributes:
        under_way: The micro-batch under way.
        module: Number of the stack.
    """

    under_way: UnderWay
    module: int

    def __call__(self, rows: Tensor, pairs: Pairs, p: float) -> Tensor | None:
        """Return the mask of rows (pairs, in), scaled; None outside a training step, or if it sees other tokens."""
        places = self.under_way.places
        if places is None or places.num_tokens != pairs.num_tokens:
            return None
        threshold, features = threshold_of(p), rows.shape[1]
        kept = Mask(places, self.module, threshold).kept(pairs.top_k * features, rows.dtype, rows.device)
        # Indexing copies: the mask itself lies in memory that the next one takes over.
        return kept.view(-1, features)[pairs.order] / keep_rate(threshold)


def key_expert_dropout(model: nn.Module, under_way: UnderWay) -> None:
    """Let the adapted experts of a model draw their dropout from the key of the sequence under way."""
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, ParamWrapper)}
    for number, (_, wrapper) in enumerate(sorted(wrappers.items())):  # by name, as linear layers are numbered
        wrapper.mask = ExpertDropout(under_way, FIRST + number)
