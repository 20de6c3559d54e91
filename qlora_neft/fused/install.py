"""Which modules of a model take the fast path, and how they get on it and off it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..base.expert_lora import is_expert_lora
from .base_dropout import BaseDropouts
from .casts import Casts
from .layers import (
    FusedLinear,
    FusedMLP,
    Group,
    KeyedDropout,
    LayerState,
    MLPState,
    own_class,
    swap,
    swap_back,
)
from .ops import ACTIVATIONS, Activation
from .under_way import UnderWay

# Layers of one module that families call with the same input, by their names.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
# The layers of an MLP: on the way in (gate before up, or one alone), and out.
MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")


class FastPath:
    """The fused forward passes of one model.

    Args:
        model: Its LoRA layers and their dropout are given other classes in place; `uninstall` takes that back.
        under_way: The micro-batch under way, from the model's trainer.
        fused: Whether layers are fused; False for keyed dropout alone.

    Attributes:
        not_fused: Names of the layers that keep PEFT's path, and why.
        num_fused: Layers that are fused.
    """

    def __init__(self, model: nn.Module, under_way: UnderWay, *, fused: bool = True) -> None:
        self.not_fused: dict[str, str] = {}
        self.num_fused = 0
        self._model, self._under_way, self._fused = model, under_way, fused
        self._casts = Casts(under_way)
        self._groups: list[Group] = []
        self._base_dropouts: BaseDropouts | None = None
        under_way.at_end.append(self._end_micro_batch)
        self.install()

    def install(self) -> None:
        """Put every module that can be on the fast path there; again after adapters were added or removed."""
        self._take_back()
        # Experts have a forward pass of their own (`base.expert_lora`), and keyed dropout (`.expert_dropout`).
        layers = {n: m for n, m in self._model.named_modules() if isinstance(m, LoraLayer) and not is_expert_lora(m)}
        layers = dict(sorted(layers.items()))
        # By name and not by place in the model: the same adapter has the same masks wherever it is loaded.
        states = {
            name: LayerState(layer, number, self._under_way, self._casts)
            for number, (name, layer) in enumerate(layers.items())
            if isinstance(layer, nn.Module)
        }
        for state in states.values():
            for dropout in cast(Any, state.layer).lora_dropout.values():
                if type(dropout) is nn.Dropout:
                    swap(dropout, KeyedDropout, state)
        self._base_dropouts = BaseDropouts(self._model, self._under_way)
        if not self._fused:
            return
        reasons = {name: why_not_fused(state.layer) for name, state in states.items()}
        self.not_fused = {name: reason for name, reason in reasons.items() if reason}
        self.not_fused |= {
            name: "modules_to_save"
            for name, module in self._model.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        }
        covered = {name: state for name, state in states.items() if not reasons[name]}
        self.num_fused = len(covered)
        for state in covered.values():
            swap(state.layer, FusedLinear, state)
        self._groups = list(_groups(covered))
        for module, state in _mlps(self._model, covered):
            swap(module, FusedMLP, state)

    def uninstall(self) -> None:
        """Give every module its own class back."""
        self._take_back()
        self._under_way.at_end.remove(self._end_micro_batch)

    def record(self) -> dict[str, Any]:
        """Return what a run's summary says of it."""
        return {"fused_lora": self._fused, "fused_layers": self.num_fused, "not_fused": self._reasons()}

    def line(self) -> str | None:
        """Return what a user should know, in one line; None if every layer is fused."""
        if not self._fused or not self.not_fused:
            return None
        reasons = "; ".join(f"{count} layers: {reason}" for reason, count in self._reasons().items())
        return (
            f"fused LoRA: {self.num_fused} layers; the rest takes PEFT's path, slower and equal in result ({reasons})"
        )

    def dropout_line(self) -> str | None:
        """Return which dropout depends on how a step is split, in one line; None if none does."""
        return None if self._base_dropouts is None else self._base_dropouts.line()

    def _reasons(self) -> dict[str, int]:
        return dict(Counter(self.not_fused.values()))

    def _take_back(self) -> None:
        for module in self._model.modules():
            # Other parts of the fast path swap classes as well.
            if isinstance(module, (KeyedDropout, FusedLinear, FusedMLP)):
                swap_back(module)
        if self._base_dropouts is not None:
            self._base_dropouts.remove_hooks()
        self._base_dropouts = None
        self._groups, self.not_fused, self.num_fused = [], {}, 0

    def _end_micro_batch(self) -> None:
        for group in self._groups:
            group.end()


def why_not_fused(layer: nn.Module) -> str | None:
    """Return why a LoRA layer keeps PEFT's path, None if it need not."""
    if own_class(layer) not in _linear_classes():
        return "not a linear layer in NF4 or full precision"
    own = cast(Any, layer)
    base = own.base_layer
    if isinstance(base, BaseTunerLayer):
        return "an adapter on an adapter"
    if not (isinstance(base, Linear4bit) or type(base) is nn.Linear):
        return f"its base is a {type(base).__name__}"
    if getattr(own, "fan_in_fan_out", False):
        return "fan_in_fan_out"
    if any(param.requires_grad for param in base.parameters()):
        return "its base is trained as well"
    state = getattr(base.weight, "quant_state", None)
    if isinstance(base, Linear4bit) and (state is None or tuple(state.shape) != (base.out_features, base.in_features)):
        return "its base is not quantized yet"
    names = [name for name in own.active_adapters if name in own.lora_A]
    if len(names) != 1:
        return "no adapter is active" if not names else "several adapters are active"
    variant = own.lora_variant.get(names[0])
    if variant is not None:
        return type(variant).__name__.removesuffix("LinearVariant")
    return "lora_bias" if own.lora_bias.get(names[0]) else None


def _linear_classes() -> tuple[type, ...]:
    # PEFT defines the first only where bitsandbytes is installed.
    return (getattr(lora, "Linear4bit", lora.Linear), lora.Linear)


# ---- Layers that belong together ----


def _groups(layers: dict[str, LayerState]) -> Iterator[Group]:
    """Yield the groups of covered layers, by their full names, that read one input."""
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for names in SAME_INPUT:
            members = [layers[full] for name in names if (full := f"{parent}.{name}") in layers]
            widths = {cast(Any, state.layer).in_features for state in members}
            if len(members) > 1 and len(widths) == 1:
                group = Group(members)
                for state in members:
                    state.group = group
                yield group


def _mlps(model: nn.Module, layers: dict[str, LayerState]) -> Iterator[tuple[nn.Module, MLPState]]:
    """Yield the MLPs that compute what `LoRAMLP` does, which each kind of module shows once by doing it."""
    known: dict[tuple, bool] = {}
    for name, module in list(model.named_modules()):
        state = _mlp_of(name, module, layers)
        if state is None:
            continue
        kind = _kind(module, state)
        if kind not in known:
            known[kind] = _computes_the_same(module, state)
        if known[kind]:
            yield module, state


def _mlp_of(name: str, module: nn.Module, layers: dict[str, LayerState]) -> MLPState | None:
    """Return a module's parts if they are those of an MLP, and it has no others."""
    children = dict(module.named_children())
    for inner, out in MLPS:
        parts = [layers.get(f"{name}.{part}") for part in (*inner, out)]
        found = [attribute for attribute in ACTIVATION_NAMES if callable(getattr(module, attribute, None))]
        if None in parts or len(found) != 1:
            continue
        others = [child for key, child in children.items() if key not in (*inner, out, found[0])]
        act = getattr(module, found[0])
        if others or _drops(module) or any(p.requires_grad for p in getattr(act, "parameters", list)()):
            continue
        *first, down = cast("list[LayerState]", parts)
        return MLPState(first, down, _known_activation(act))
    return None


def _drops(module: nn.Module) -> bool:
    """Whether a module has dropout of its own, which a trial in eval mode would not show."""
    return any("drop" in key and value for key, value in vars(module).items() if isinstance(value, float))


def _known_activation(act: Callable[[Tensor], Tensor]) -> Activation:
    """Return the activation function as one of those with a derivative in one pass, if it is one of them."""
    x = torch.linspace(-8, 8, 1025, device="cpu", dtype=torch.float32)
    try:
        with torch.no_grad():
            y = act(x)
    except RuntimeError:  # it has weights on another device
        return Activation("other", act)
    same = [known for known in ACTIVATIONS.values() if torch.allclose(known.function(x), y, rtol=1e-5, atol=1e-6)]
    return same[0] if same else Activation("other", act)


def _kind(module: nn.Module, state: MLPState) -> tuple:
    """Return what decides how a module computes: class, activation and the plain attributes of the instance."""
    plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    widths = [key for key in plain if key.endswith(("_size", "_dim")) or key.startswith("layer_id")]
    for key in widths:
        plain.pop(key)
    return type(module), state.activation.name, len(state.inner), repr(sorted(plain.items()))


@torch.no_grad()
def _computes_the_same(module: nn.Module, state: MLPState) -> bool:
    """Whether a module gives what its layers give in the order of `LoRAMLP`; tried in eval mode, without dropout."""
    base = cast(Any, state.inner[0].layer).base_layer
    if base.weight.device.type == "meta":
        return False
    dtype = base.compute_dtype if isinstance(base, Linear4bit) else base.weight.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, base.in_features, generator=generator, device="cpu").to(base.weight.device, dtype)
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        first, *rest = [state_.layer(x) for state_ in state.inner]
        between = state.activation.of(first)
        expected = state.down.layer(between * rest[0] if rest else between)
        found = module(x)
    except (RuntimeError, TypeError, ValueError):  # it takes something else
        return False
    finally:
        for part, was in training:
            part.training = was
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
