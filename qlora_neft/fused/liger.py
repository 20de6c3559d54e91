"""Liger's kernels, of those pieces that nothing here covers: rotary embeddings, norms and MLPs that are not fused.

Liger replaces functions of transformers' modeling files for the whole process (``apply_liger_kernel_to_*``, its
documented way). So it is applied for the length of training only and taken back afterwards: a model of the same family
on the CPU would find kernels that its tensors cannot enter. TRL's fused head and loss stay.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UserInputError

MODELING = "transformers.models."
MAX_ERROR = 0.05  # relative, of the last hidden states; at half precision rounding alone makes up to a hundredth
PROBE_TOKENS = 8


def why_not_liger(device: torch.device, model_type: str) -> str:
    """Return why Liger's kernels cannot serve a model on a device; empty if they can."""
    if device.type != "cuda":
        return f"Liger's kernels need a CUDA device, and the model is on {device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed (pip install 'qlora-neft[fast]')"
    try:
        return "" if model_type in _families() else f"Liger has no kernels for {model_type}"
    except ImportError as error:  # it refuses some versions of transformers
        return f"Liger cannot be imported ({error})"


def check_liger(device: torch.device, model_type: str, asked: bool | None) -> str:
    """Return why Liger is not used; empty if it is.

    Raises:
        UserInputError: If it is insisted on and cannot serve.
    """
    if asked is False:
        return "use_liger_kernel is false"
    reason = why_not_liger(device, model_type)
    if asked and reason:
        raise UserInputError(f"use_liger_kernel: {reason}, got true. Use auto.")
    return reason


def pieces_of(
    model_type: str, *, own_rotary: bool, own_norms: bool, own_mlps: bool, has_experts: bool
) -> dict[str, bool]:
    """Return the arguments of Liger's function for a family: which pieces it replaces.

    Args:
        model_type: As in the model's configuration.
        own_rotary: Whether rotary embeddings have a fast path of ours.
        own_norms: Whether norms have.
        own_mlps: Whether MLPs have.
        has_experts: Whether blocks are mixtures of experts, which Liger would replace by code that expects 16 bits.
    """
    wanted = {
        "rope": not own_rotary,
        "rms_norm": not own_norms,
        **dict.fromkeys(("swiglu", "geglu", "relu_squared"), not own_mlps and not has_experts),
    }
    # Everything else, such as its losses, is switched off by name: most of it is on by default.
    arguments = inspect.signature(_families()[model_type]).parameters.values()
    return {a.name: wanted.get(a.name, False) for a in arguments if isinstance(a.default, bool)}


@contextmanager
def liger_applied(
    model: nn.Module, pieces: dict[str, bool], autocast: Callable[[], AbstractContextManager] | None
) -> Generator[str, None, None]:
    """Apply Liger to a model of transformers inside the block; yield a line for the user.

    The hidden states of a few tokens are compared before and after. Where they differ by more than rounding, Liger is
    taken back at once.

    Args:
        model: Without PEFT's wrapper.
        pieces: From `pieces_of`.
        autocast: Makes the context that a forward pass runs in, for the comparison; None for no comparison.
    """
    before = None if autocast is None else _hidden_states(model, autocast)
    take_back = _applied(model, pieces)
    try:
        names = ", ".join(name for name, on in pieces.items() if on)
        line = f"Liger: {names}"
        if autocast is not None and before is not None:
            error = ((_hidden_states(model, autocast) - before).norm() / before.norm()).item()
            if not error <= MAX_ERROR:
                take_back()
                line = f"Liger: not used, {names} gave other hidden states (relative error {error:.2g})"
        yield line
    finally:
        take_back()


def _families() -> dict[str, Callable[..., None]]:
    # By name: an extra that is not installed where types are checked.
    module = importlib.import_module("liger_kernel.transformers.monkey_patch")
    return cast("dict[str, Callable[..., None]]", module.MODEL_TYPE_TO_APPLY_LIGER_FN)


def _applied(model: nn.Module, pieces: dict[str, bool]) -> Callable[[], None]:
    """Apply Liger and return what takes it back: it has nothing for that itself."""
    apply = _families()[cast(Any, model).config.model_type]
    files = {n: (m, dict(vars(m))) for n, m in list(sys.modules.items()) if n.startswith(MODELING) and "modeling" in n}
    modules = [(module, dict(vars(module))) for module in model.modules()]
    apply(**pieces, model=model)
    # Looked for now: what others set later is not Liger's.
    replaced = [
        (file, name, value)
        for file, names in files.values()
        for name, value in names.items()
        if vars(file).get(name) is not value
    ]
    added = [(module, vars(module).keys() - attributes.keys()) for module, attributes in modules]

    def take_back() -> None:
        for file, name, value in replaced:
            setattr(file, name, value)
        for module, names in added:
            for name in names:
                vars(module).pop(name, None)

    return take_back


@torch.no_grad()
def _hidden_states(model: nn.Module, autocast: Callable[[], AbstractContextManager]) -> Tensor:
    """Return the last hidden states of a few tokens, in eval mode."""
    own = cast(Any, model)
    backbone, training = own.base_model, [(module, module.training) for module in model.modules()]
    ids = torch.arange(1, PROBE_TOKENS + 1, device=own.get_input_embeddings().weight.device)[None]
    model.eval()
    try:
        with autocast():
            return backbone(input_ids=ids, use_cache=False).last_hidden_state.float()
    finally:
        for module, was in training:
            module.training = was
