"""PEFT's LoRA layers and transformers' MLPs with a fused forward pass in training, and their own everywhere else.

A covered module is an instance of a class made here, a subclass of its own: `isinstance`, parameter names, saving,
merging and loading see what they always saw. A copy or pickle of it is of its own class again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .casts import Casts
from .linear import LoRALinears, Projection
from .masks import Mask, Places, keep_rate, threshold_of
from .mlp import LoRAMLP
from .ops import Activation, dropped
from .under_way import UnderWay


class Swapped(nn.Module):
    """Mixed in front of a module's own class."""

    fused: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as a module of the own class, without what ties it to a trainer."""
        state = {key: value for key, value in vars(self).items() if key != "fused"}
        return _as_it_was, (own_class(self),), state


def swap(module: nn.Module, mixin: type[Swapped], fused: Any) -> None:
    """Give one module a fast forward pass."""
    vars(module)["fused"] = fused  # not by setattr: it refers to other modules, which are no children of this one
    module.__class__ = _swapped_class(type(module), mixin)


def swap_back(module: nn.Module) -> None:
    """Give a module its own class back."""
    vars(module).pop("fused", None)
    module.__class__ = own_class(module)


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has without the fast path."""
    own = type(module).__bases__[1] if isinstance(module, Swapped) else type(module)
    return cast("type[nn.Module]", own)


@cache
def _swapped_class(own: type[nn.Module], mixin: type[Swapped]) -> type[nn.Module]:
    # Under its own name: what prints or matches class names finds what it knows.
    return type(own.__name__, (mixin, own), {"__module__": own.__module__})


def _as_it_was(own: type[nn.Module]) -> nn.Module:
    return own.__new__(own)


# ---- Dropout ----


class KeyedDropout(Swapped):
    """An adapter's dropout outside the fused functions, with the masks that they would use."""

    fused: LayerState

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` with elements dropped, the kept ones scaled up; torch's own where tokens are unknown."""
        state, p = self.fused, cast(float, self.p)
        places = state.places(input)
        if not self.training or p == 0 or places is None:
            return super().forward(input)
        return MaskedScale.apply(input, Mask(places, state.number, threshold_of(p)))


class MaskedScale(torch.autograd.Function):
    """Dropout by a mask that is drawn again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask) -> Tensor:
        """Return x∘m / q."""
        ctx.mask = mask
        return _masked_and_scaled(x, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of ``x``."""
        return _masked_and_scaled(grad, ctx.mask), None


def _masked_and_scaled(x: Tensor, mask: Mask) -> Tensor:
    return dropped(x.reshape(-1, x.shape[-1]), mask).div_(keep_rate(mask.threshold)).view(x.shape)


# ---- Linear layers ----


@dataclass(eq=False)
class LayerState:
    """What the fast path knows of one LoRA layer.

    Attributes:
        layer: The layer.
        number: Its number among the model's LoRA layers, in the order of their names; the stream of its masks.
        under_way: The micro-batch under way.
        casts: The adapters' weights in other dtypes.
        group: Layers that read the same input; None for one alone.
    """

    layer: nn.Module
    number: int
    under_way: UnderWay
    casts: Casts
    group: Group | None = None

    def places(self, x: Tensor) -> Places | None:
        """Return which tokens ``x``, (..., K), holds; None if it does not hold exactly the micro-batch's."""
        places = self.under_way.places
        # Experts get some of the tokens, in another order.
        return None if places is None or x.numel() != places.num_tokens * x.shape[-1] else places

    def adapter(self) -> str | None:
        """Return the one adapter that is active; None if PEFT does anything but add that one."""
        layer = cast(Any, self.layer)
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(names) != 1 or layer.disable_adapters or layer.merged or not layer.training:
            return None
        [name] = names
        return None if name in layer.lora_variant or layer.lora_bias.get(name) else name

    def projection(self, x: Tensor) -> tuple[Projection, tuple[Tensor, Tensor]] | None:
        """Return the layer as it is used on ``x``, and its A and B; None where it takes PEFT's path."""
        if not self.under_way.is_active or (name := self.adapter()) is None:
            return None
        layer = cast(Any, self.layer)
        base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        if (dtype := product_dtype(base, x, a)) is None:
            return None
        mask, p = None, getattr(layer.lora_dropout[name], "p", 0.0)
        if p > 0:
            places = self.places(x)
            if places is None:
                return None
            mask = Mask(places, self.number, threshold_of(p))
        lora_a, lora_b = self.casts.of(a, dtype), self.casts.of(b, dtype)
        return Projection(base, lora_a, lora_b, layer.scaling[name], mask), (a, b)


@dataclass(eq=False)
class Group:
    """LoRA layers that are called with the same tensor one after another, such as q, k and v.

    The first that is called computes all, so that the gradient of their input is added up in place; the others find
    their output ready.
    """

    members: list[LayerState]
    is_alone: bool = False  # whether the layers turned out to read different inputs
    _input: Tensor | None = None
    _outputs: dict[LayerState, Tensor] = field(default_factory=dict)

    def take(self, member: LayerState, x: Tensor) -> Tensor | None:
        """Return the output that is ready for a member and its input, if there is one."""
        if self._input is not x or member not in self._outputs:
            return None
        output = self._outputs.pop(member)
        if not self._outputs:
            self._input = None
        return output

    def keep(self, x: Tensor, outputs: dict[LayerState, Tensor]) -> None:
        """Keep outputs for the members that are called next."""
        self._input, self._outputs = x, outputs

    def end(self) -> None:
        """Let go of what nobody took; then the layers do not belong together, and are computed alone from now on.

        Not before the micro-batch has passed: a checkpointed block must compute again what it computed before.
        """
        self.is_alone = self.is_alone or bool(self._outputs)
        self._input = None
        self._outputs.clear()


class FusedLinear(Swapped):
    """A LoRA layer on a frozen linear one."""

    fused: LayerState

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, (..., N), of (..., K)."""
        output = None if args or kwargs else _grouped_output(self.fused, x)
        return super().forward(x, *args, **kwargs) if output is None else output


def _grouped_output(state: LayerState, x: Tensor) -> Tensor | None:
    group = state.group
    if group is None or group.is_alone:
        return _outputs([state], x)[0]
    if (ready := group.take(state, x)) is not None:
        return ready
    outputs = dict(zip(group.members, _outputs(group.members, x), strict=True))
    if any(output is None for output in outputs.values()):
        return _outputs([state], x)[0]
    own = outputs.pop(state)
    group.keep(x, cast("dict[LayerState, Tensor]", outputs))
    return own


def _outputs(states: Sequence[LayerState], x: Tensor) -> list[Tensor] | list[None]:
    """Return the layers' outputs in one function; Nones if one of them takes PEFT's path."""
    found = [state.projection(x) for state in states]
    if any(one is None for one in found):
        return [None] * len(states)
    projections, adapters = zip(*cast(Any, found), strict=True)
    weights = [weight for pair in adapters for weight in pair]
    outputs = LoRALinears.apply(_flat(x, projections[0]), projections, *weights)
    return [_shaped(y, x, p) for y, p in zip(outputs, projections, strict=True)]


def _flat(x: Tensor, projection: Projection) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(projection.lora_a.dtype)


def _shaped(y: Tensor, x: Tensor, projection: Projection) -> Tensor:
    """Return an output in the form, and the dtype, that the layer itself would give it."""
    y = y.view(*x.shape[:-1], y.shape[-1])
    # bitsandbytes returns the input's dtype; a plain linear layer, under autocast, autocast's.
    return y.to(x.dtype) if isinstance(projection.linear, Linear4bit) else y


def product_dtype(base: nn.Module, x: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the dtype in which a layer's products are taken; None where base and adapter differ in it."""
    if not x.is_floating_point():
        return None
    is_nf4 = isinstance(base, Linear4bit)
    own = cast("torch.dtype | None", base.compute_dtype if is_nf4 else cast(Tensor, base.weight).dtype)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return dtype if own == dtype or not is_nf4 else None
    return own if own == x.dtype == weight.dtype else None


# ---- MLPs ----


@dataclass(eq=False)
class MLPState:
    """What the fast path knows of one MLP.

    Attributes:
        inner: Its layers on the way in: gate and up, or one.
        down: Its layer on the way out.
        activation: Between them.
    """

    inner: list[LayerState]
    down: LayerState
    activation: Activation


class FusedMLP(Swapped):
    """An MLP of LoRA layers."""

    fused: MLPState

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the MLP's output, (..., N), of (..., K)."""
        output = None if len(args) != 1 or kwargs else mlp_output(self.fused, args[0])
        return super().forward(*args, **kwargs) if output is None else output


def mlp_output(state: MLPState, x: Tensor) -> Tensor | None:
    """Return an MLP's output in one function; None if one of its layers takes PEFT's path or has hooks to be run."""
    layers = [*state.inner, state.down]
    if any(_has_hooks(one.layer) for one in layers):
        return None
    inner = [one.projection(x) for one in state.inner]
    if any(one is None for one in inner):
        return None
    projections, adapters = zip(*cast(Any, inner), strict=True)
    flat = _flat(x, projections[0])
    # The layer on the way out sees as many tokens, in the dtype that the others give out.
    between = x if isinstance(projections[0].linear, Linear4bit) else flat
    found = state.down.projection(between)
    if found is None:
        return None
    down, of_down = found
    weights = [weight for pair in (*adapters, of_down) for weight in pair]
    y = LoRAMLP.apply(flat, projections, down, state.activation, *weights)
    return _shaped(y, x, down)


def _has_hooks(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks) or hasattr(module, "_hf_hook")
