"""LoRA+: an optimizer in which the matrices B learn faster than the matrices A, in PEFT's grouping.

Source: Hayou et al. 2024, LoRA+, arXiv:2402.12354. A reads as many inputs as the model is wide, B as many as the rank:
at one rate for both, wide models learn too little through B.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraModel
from torch import nn
from torch.optim import Optimizer

KEY = "loraplus_lr_ratio"


def check_loraplus(model: nn.Module, ratio: float | None) -> None:
    """Refuse a ratio for a model that has no matrices B.

    Raises:
        ValueError: If the model has no LoRA.
    """
    if ratio is not None and not (isinstance(model, PeftModel) and isinstance(model.base_model, LoraModel)):
        raise ValueError(f"{KEY}: has no effect without LoRA, got {ratio:g}. Leave it None.")


def loraplus_optimizer(
    model: PeftModel, optimizer_class: Any, options: dict[str, Any], *, ratio: float, weight_decay: float
) -> Optimizer:
    """Return an optimizer of the class upstream chose, with B at ``ratio`` times the learning rate.

    The schedule scales all rates alike. Decoupled weight decay is multiplied by the rate, so B decays ``ratio`` times
    as fast; the released code does the same.

    Args:
        model: With LoRA.
        optimizer_class: Of torch or bitsandbytes.
        options: Its arguments, with the learning rate as ``lr``.
        ratio: At least 1.
        weight_decay: Of matrices; norms and biases have none.

    Raises:
        ValueError: If the optimizer groups its parameters in its own way.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)) or (
        options.keys() & {"params", "model", "optimizer_dict"}
    ):
        raise ValueError(f"{KEY}: cannot be combined with an optim that groups parameters itself, got {ratio:g}.")
    return create_loraplus_optimizer(
        model,
        optimizer_class,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=weight_decay,
        # PEFT's default for LoRA on an embedding is 1e-6 whatever the rate, which would train it in name only. Its A is
        # looked up, not multiplied, so that the argument for a higher rate of B does not hold: both learn at the rate.
        loraplus_lr_embedding=options["lr"],
        **options,
    )
