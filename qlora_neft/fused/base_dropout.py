"""Dropout of the base's own, which GPT-2, Phi or GPT-NeoX have: keyed as the adapters' is, where a module drops.

What a function drops is out of reach, and so are attention's weights: their masks are drawn for each micro-batch, and
one line says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .layers import KeyedDropout, swap
from .masks import Places
from .under_way import UnderWay

FIRST = 1 << 24  # of the numbers of their masks: no model has as many LoRA layers
CALLS = 1 << 8  # numbers apart


@dataclass(eq=False)
class DropoutState:
    """What a module with dropout of the base's own needs.

    Attributes:
        first: Number of its first mask.
        under_way: The micro-batch under way.
        number: Number of its next mask. A block may use a module several times (Phi), each time with other masks.
    """

    first: int
    under_way: UnderWay
    number: int

    def places(self, x: Tensor) -> Places | None:
        """Return which tokens ``x``, (..., K), holds; None if it does not hold exactly the micro-batch's."""
        places = self.under_way.places
        return None if places is None or x.numel() != places.num_tokens * x.shape[-1] else places

    def begin(self, *_: Any) -> None:
        """Begin with the first mask, in the forward pass of the module that owns the dropout, or its repetition."""
        self.number = self.first


class BaseDropout(KeyedDropout):
    """A dropout module of the base."""

    fused: Any

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` with elements dropped, by the next mask."""
        output = super().forward(input)
        self.fused.number += 1
        return output


class BaseDropouts:
    """The dropout inside one base.

    Args:
        model: The model. Its dropout modules are given another class in place, which `FastPath` takes back.
        under_way: The micro-batch under way, from the model's trainer.

    Attributes:
        drawn_anew: Names of dropout that is not keyed, and its probability.
    """

    def __init__(self, model: nn.Module, under_way: UnderWay) -> None:
        self.drawn_anew: dict[str, float] = {}
        self._hooks: list[Any] = []
        adapters = {
            id(part) for m in model.modules() if isinstance(m, BaseTunerLayer) for part in _own_parts(m)
        }  # their dropout is keyed elsewhere
        base = [(name, m) for name, m in model.named_modules() if id(m) not in adapters]
        self.drawn_anew |= {key: p for _, m in base for key, p in vars(m).items() if _is_probability(key, p)}
        dropouts = [(name, m) for name, m in base if type(m) is nn.Dropout and m.p > 0]
        for number, (name, module) in enumerate(sorted(dropouts, key=lambda named: named[0])):
            owner, _, last = name.rpartition(".")
            # Attention's weights, (B, heads, T, T); of such a module it is often the probability alone that is read.
            if last in ("attn_dropout", "attention_dropout"):
                self.drawn_anew[last] = module.p
                continue
            first = FIRST + number * CALLS
            state = DropoutState(first, under_way, first)
            swap(module, BaseDropout, state)
            self._hooks.append(model.get_submodule(owner).register_forward_pre_hook(state.begin))

    def line(self) -> str | None:
        """Return which masks depend on how a step is split, in one line; None if none does."""
        if not self.drawn_anew:
            return None
        found = ", ".join(f"{name} {p:g}" for name, p in sorted(self.drawn_anew.items()))
        return (
            f"the base drops out by functions of its own ({found}): their masks are drawn for each micro-batch, and, "
            "other than noise and LoRA's dropout, change with how a step is split"
        )

    def remove_hooks(self) -> None:
        """Take the hooks back."""
        for hook in self._hooks:
            hook.remove()


def _own_parts(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield an adapter's modules, without the layer of the base inside it."""
    for name, part in layer.named_children():
        if name != "base_layer":
            yield from part.modules()


def _is_probability(key: str, value: object) -> bool:
    return "drop" in key and isinstance(value, float) and 0 < value < 1
