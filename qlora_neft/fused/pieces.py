"""The pieces of the fast path beside the fused LoRA layers: kernels, norms, Liger's, compiled blocks."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from typing_extensions import TypedDict

from .kernel_check import failures, use_kernels, why_not
from .layers import FusedMLP, Swapped
from .liger import check_liger, liger_applied, pieces_of
from .norm import FewPassNorm, install_norms, uninstall_norms
from .rotary import FusedAttention, install_rotary, uninstall_rotary

COMPILER = "inductor"  # torch's own backend


@dataclass(frozen=True)
class Switches:
    """What a run asks for; none of it changes what is learned.

    Attributes:
        triton: Triton's kernels for the fused operations; None where they run.
        liger: Liger's kernels for what has no fused operation; None where they run.
        norms: RMSNorm in few passes.
        rotary: Rotary embeddings in few passes.
        compiled: Compile each block.
    """

    triton: bool | None = None
    liger: bool | None = None
    norms: bool = True
    rotary: bool = True
    compiled: bool = False


class PiecesRecord(TypedDict):
    """Which pieces were on, as ``summary.json`` has it."""

    triton_kernels: bool
    triton_failures: dict[str, str]
    fused_norms: int
    fused_rotary: int
    liger: list[str]
    torch_compile: bool


class Pieces:
    """The pieces that one model trains with.

    Args:
        model: The model, PEFT's wrapper included. Norms and attention modules are given other classes in place;
            `uninstall` takes that back.
        device: Where it is.
        switches: What is asked for.
        dtype: The dtype that it computes in.

    Raises:
        UserInputError: If something is insisted on that cannot run here.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, switches: Switches, dtype: torch.dtype = torch.float32
    ) -> None:
        self._model, self._device, self._switches, self._dtype = model, device, switches, dtype
        self._base = _without_adapters(model)
        config = cast(Any, self._base).config
        self._no_liger = check_liger(device, config.model_type, switches.liger)
        kernels = use_kernels(device, dtype, switches.triton)
        self._lines = [kernels] if device.type == "cuda" else []  # a CPU has nothing to choose from
        if switches.norms:
            install_norms(model)
        if switches.rotary:
            install_rotary(model)
        self._liger: list[str] = []

    @contextmanager
    def in_use(self, autocast: Callable[[], AbstractContextManager] | None = None) -> Generator[list[str], None, None]:
        """Train with what is there for the length of training only: Liger's kernels and compiled blocks.

        Args:
            autocast: Makes the context that a forward pass runs in, to compare Liger's results with upstream's.

        Yields:
            What a user should know of all choices, one line each; nothing where there was none to make.
        """
        lines = list(self._lines)
        with ExitStack() as stack:
            if not self._no_liger:
                pieces = self._pieces()
                line = "Liger: not used (what it has is fused here)"
                if any(pieces.values()):
                    line = stack.enter_context(liger_applied(self._base, pieces, autocast))
                lines.append(line)
                self._liger = [] if "not used" in line else [name for name, on in pieces.items() if on]
            elif self._device.type == "cuda":
                lines.append(f"Liger: not used ({self._no_liger})")
            if self._switches.compiled:
                stack.enter_context(compiled_blocks(self._model))
                lines.append("blocks are compiled: the first steps take longer")
            yield lines

    def uninstall(self) -> None:
        """Give every norm and attention module its own class back."""
        uninstall_norms(self._model)
        uninstall_rotary(self._model)

    def record(self) -> PiecesRecord:
        """Return what a run's summary says of it."""
        triton = not why_not(self._device) and self._switches.triton is not False
        return {
            "triton_kernels": triton,
            "triton_failures": failures(self._device, self._dtype) if triton else {},
            "fused_norms": sum(isinstance(module, FewPassNorm) for module in self._model.modules()),
            "fused_rotary": sum(isinstance(module, FusedAttention) for module in self._model.modules()),
            "liger": self._liger,
            "torch_compile": self._switches.compiled,
        }

    def _pieces(self) -> dict[str, bool]:
        config, modules = cast(Any, self._base).config, list(self._model.modules())
        return pieces_of(
            config.model_type,
            own_rotary=any(isinstance(module, FusedAttention) for module in modules),
            own_norms=any(isinstance(module, FewPassNorm) for module in modules),
            own_mlps=any(isinstance(module, FusedMLP) for module in modules),
            has_experts=any(
                "expert" in key and isinstance(value, int) and value > 0 for key, value in vars(config).items()
            ),
        )


@contextmanager
def compiled_blocks(model: nn.Module, **options: Any) -> Generator[None, None, None]:
    """Compile each decoder block inside the block, one graph for all that are alike; names stay as they are.

    Fused layers stay out of the graphs: they are few launches already, and read the step under way, of which a
    compiled graph would make a constant.

    Args:
        model: The model.
        options: For `torch.compile`; default its own backend, for sequences of any length.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    kept_out = [module for block in blocks for module in block.modules() if isinstance(module, Swapped)]
    try:
        for module in kept_out:
            vars(module)["forward"] = torch.compiler.disable(module.forward)
        for block in blocks:
            block.compile(**{"dynamic": True, "backend": COMPILER, **options})
        yield
    finally:
        for module in kept_out:
            vars(module).pop("forward", None)
        for block in blocks:
            block._compiled_call_impl = None


def _without_adapters(model: nn.Module) -> nn.Module:
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model
