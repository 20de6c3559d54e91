"""What a loaded model is, counted on the model itself: how much of it is in NF4, what is adapted, what can be trained.

Neither its configuration nor the name of its quantization is believed: bitsandbytes passes over whatever is not of the
one class it replaces, and PEFT over whatever it does not match.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UserInputError
from .expert_names import DOWN, UP_NAMES
from .experts import QuantizedExperts, expert_modules
from .quantizer import routers

MIN_NF4_SHARE = 0.9  # of the block weights, for a base that is called NF4
NORMS, ROUTERS, NOT_QUANTIZED = "norms and biases", "routers", "not quantized"
SHOWN = 3  # kinds of layers that a line names


@dataclass(frozen=True)
class Kept:
    """Weights of the blocks that are not in NF4.

    Attributes:
        names: Their names, with ``*`` for the numbers of layers.
        weights: How many numbers they are.
        why: Why they are not.
    """

    names: str
    weights: int
    why: str


@dataclass(frozen=True)
class Census:
    """The counts of one model. Weights are numbers, whatever they are stored in.

    Attributes:
        block_weights: Weights of the blocks: all but embeddings and the output layer. Adapters do not count.
        nf4_weights: Those of them in NF4.
        kept: The others, largest first.
        linear_layers: Linear layers, a stack of experts counting as one; output layer and routers apart.
        adapted_layers: Those of them with LoRA.
        without_lora: Names of the others, with ``*`` for the numbers of layers.
        routers: Names of what chooses experts, none of it quantized or adapted unless it is named; likewise.
        trained: Trained weights.
        reached: Those of them that the loss depends on; None before it was measured.
    """

    block_weights: int
    nf4_weights: int
    kept: tuple[Kept, ...]
    linear_layers: int
    adapted_layers: int
    without_lora: tuple[str, ...]
    routers: tuple[str, ...]
    trained: int
    reached: int | None = None

    @property
    def nf4_share(self) -> float:
        """Share of the block weights in NF4."""
        return self.nf4_weights / self.block_weights if self.block_weights else 0.0

    @property
    def reached_share(self) -> float | None:
        """Share of the trained weights that can receive a gradient."""
        return None if self.reached is None or not self.trained else self.reached / self.trained

    @property
    def is_quantized(self) -> bool:
        """Whether the base was loaded to be in NF4, however much of it is."""
        return all(kept.why != NOT_QUANTIZED for kept in self.kept)

    @property
    def in_full(self) -> bool:
        """Whether the blocks themselves are trained."""
        return not self.adapted_layers and self.trained >= self.block_weights > 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as ``summary.json`` holds them."""
        return {**asdict(self), "nf4_share": self.nf4_share, "reached_share": self.reached_share}

    def line(self) -> str:
        """Return all of it in one line."""
        if self.is_quantized:
            parts = [f"counted: {percent(self.nf4_share)} of the block weights in NF4"]
            large = [kept for kept in self.kept if kept.why not in (NORMS, ROUTERS)]
            if large:
                parts.append(f"in 16 bits: {_listed(f'{k.names} ({k.why})' for k in large)}")
        else:
            parts = ["counted: not quantized"]
        if self.in_full:
            parts.append("no adapter")
        else:
            parts.append(f"LoRA on {self.adapted_layers} of {self.linear_layers} linear layers")
            if self.without_lora:
                parts.append(f"none on {_listed(self.without_lora)}")
            if self.routers:
                parts.append("routers not trained")
        if self.reached_share is not None:
            parts.append(f"{percent(self.reached_share)} of {self.trained:,} trained weights receive a gradient")
        return "; ".join(parts)


def percent(share: float) -> str:
    """Return a share as text; only all of it is 100%."""
    text = f"{share:.1%}"
    return text if share == 1 or text != "100.0%" else "99.9%"


def census(model: nn.Module) -> Census:
    """Count a model, on the meta device as well; see `Census`."""
    base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    block, nf4, kept = 0, 0, dict[tuple[str, str], int]()
    router_names = set(_routers(base))
    plain = getattr(base.config, "quantization_config", None) is None  # nobody asked for NF4
    for name, owner, param in _block_parameters(base):
        weights = _count(owner, name, param)
        block += weights
        if _is_nf4(owner, name):
            nf4 += weights
        else:
            why = _why(owner, name, param, router_names)
            key = _pattern(name), NOT_QUANTIZED if plain and why != NORMS else why
            kept[key] = kept.get(key, 0) + weights
    layers = dict(_linear_layers(base, router_names))
    return Census(
        block_weights=block,
        nf4_weights=nf4,
        kept=tuple(Kept(n, w, why) for (n, why), w in sorted(kept.items(), key=lambda item: -item[1])),
        linear_layers=len(layers),
        adapted_layers=sum(layers.values()),
        without_lora=tuple(sorted({_pattern(name) for name, has_lora in layers.items() if not has_lora})),
        routers=tuple(sorted({_pattern(name) for name in router_names})),
        trained=sum(param.numel() for param in model.parameters() if param.requires_grad),
    )


def check_nf4_share(found: Census, least: float, name: str) -> None:
    """Refuse a base that is called NF4 and is not.

    Args:
        found: Of the base.
        least: Share of the block weights that must be in NF4.
        name: The base, as the caller named it.

    Raises:
        UserInputError: With what stayed in 16 bits, and why.
    """
    if found.nf4_share >= least:
        return
    reasons = _listed(
        f"{kept.names} ({percent(kept.weights / found.block_weights)}; {kept.why})"
        for kept in found.kept
        if kept.why != NORMS
    )
    raise UserInputError(
        f"quantization.min_nf4_share: at least {least:.0%} of the block weights must be in NF4, of {name!r} "
        f"{percent(found.nf4_share)} are. In 16 bits: {reasons or 'norms and biases'}. Choose another base, or write "
        f"min_nf4_share: {_below(found.nf4_share):g} to train this one as it is."
    )


def with_reached(found: Census, model: nn.Module) -> Census:
    """Return a census with the trained weights that the loss depends on, from one forward pass over four tokens.

    The graph that autograd records is followed from the logits; no gradient is computed. What it does not lead to, such
    as the keys of layers that use another layer's, would be trained in name only.
    """
    embedding = cast(PreTrainedModel, model).get_input_embeddings()
    ids = torch.arange(4, device=next(embedding.parameters()).device)[None]  # (1, 4)
    was_training = model.training
    model.eval()  # no dropout: nothing is drawn
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        leaves = _leaves_of(logits.grad_fn)
    finally:
        model.train(was_training)
    reached = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) in leaves)
    return replace(found, reached=reached)


def _leaves_of(node: Any) -> set[int]:
    """Return the ids of the tensors in which a graph ends."""
    found, seen, pending = set(), set(), [node]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending.extend(following for following, _ in node.next_functions)
    return found


# ---- Weights ----


def _block_parameters(base: PreTrainedModel) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Return the frozen or trained weights of the blocks: name, module they are in, weight."""
    apart = {id(param) for module in _apart(base) for param in module.parameters()}
    seen = set()
    for prefix, module in base.named_modules():
        for own, param in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}" if prefix else own
            if id(param) in seen | apart or _is_of_adapter(name):
                continue
            seen.add(id(param))
            yield name.replace(".base_layer", ""), module, param


def _apart(base: PreTrainedModel) -> Iterator[nn.Module]:
    head = base.get_output_embeddings()
    if head is not None:
        yield head
    yield from (module for module in base.modules() if isinstance(module, nn.Embedding))


def _is_of_adapter(name: str) -> bool:
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def _count(owner: nn.Module, name: str, param: nn.Parameter) -> int:
    own = name.rpartition(".")[2]
    if isinstance(owner, QuantizedExperts) and own in owner.matrix_shapes:
        return owner.num_experts * torch.Size(owner.matrix_shapes[own]).numel()
    if isinstance(owner, Linear4bit) and own == "weight":
        return owner.in_features * owner.out_features
    return param.numel()


def _is_nf4(owner: nn.Module, name: str) -> bool:
    own = name.rpartition(".")[2]
    if isinstance(owner, QuantizedExperts):
        return own in owner.matrix_shapes
    return isinstance(owner, Linear4bit) and own == "weight" and cast(Params4bit, owner.weight).quant_type == "nf4"


def _why(owner: nn.Module, name: str, param: nn.Parameter, router_names: set[str]) -> str:
    own, kind = name.rpartition(".")[2], type(owner).__name__
    if param.dim() < 2 or own.endswith("bias"):
        return NORMS
    if name.rpartition(".")[0] in router_names:
        return ROUTERS
    if isinstance(owner, Linear4bit):
        return f"{cast(Params4bit, owner.weight).quant_type}, not NF4"
    if type(owner) is nn.Linear or isinstance(owner, Conv1D):
        return "kept by its architecture or its checkpoint"
    if isinstance(owner, nn.Linear):
        return f"{kind} computes more than a linear layer"
    return f"{kind} is no linear layer"


# ---- Layers ----


def _linear_layers(base: PreTrainedModel, router_names: set[str]) -> Iterator[tuple[str, bool]]:
    """Return the linear layers and stacks of experts by name, and whether each has LoRA."""
    head = base.get_output_embeddings()
    experts = {id(module) for _, module in expert_modules(base)}
    for name, module in base.named_modules():
        plain = name.replace(".base_layer", "")
        if _is_of_adapter(name) or module is head or plain in router_names:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            yield plain, _has_lora(base, name)
        elif id(module) in experts:
            stacks = [stack for stack in (*UP_NAMES, DOWN) if stack in dict(module.named_parameters(recurse=False))]
            yield from ((f"{plain}.{stack}", _has_stack_lora(base, name, stack)) for stack in stacks)


def _has_lora(base: nn.Module, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    owner = base.get_submodule(parent) if last == "base_layer" else None
    return isinstance(owner, BaseTunerLayer)


def _has_stack_lora(base: nn.Module, name: str, stack: str) -> bool:
    """Whether one of the wrappers around experts, each within the next, is of this stack."""
    parts = name.split(".")
    while parts and parts[-1] == "base_layer":
        parts.pop()
        owner = base.get_submodule(".".join(parts))
        if getattr(owner, "parameter_name", None) == stack:
            return True
    return False


def _routers(base: PreTrainedModel) -> list[str]:
    """Return what chooses experts by name: linear layers that do, and transformers' own modules for it."""
    own = {name.replace(".base_layer", "") for name in routers(base)}
    for name, module in base.named_modules():
        kind = type(module).__name__
        weight = getattr(module, "weight", None)
        if re.search(r"Router|TopK|TopkGate|MoEGate|Gating", kind) and isinstance(weight, nn.Parameter):
            own.add(name)
    return sorted(own)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _listed(items: Iterable[str]) -> str:
    found = list(items)
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _below(share: float) -> float:
    return int(share * 100) / 100
