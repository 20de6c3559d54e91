"""The proof of a merge: every strategy beside the NF4 base with its adapter, on the same rows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ..precision import PrecisionPolicy
from ..remote_code import NOT_RUN
from ..trained.load import nf4_base_of, with_adapter
from .checkpoint import Checkpoint, skeleton
from .memory import available_bytes
from .plan import Plan
from .proof import Distance, Reference, distance, reference_of
from .rows import ProofRows
from .streamed import Streamed
from .table import sized


@dataclass(frozen=True)
class Evidence:
    """What was measured.

    Attributes:
        strategies: Distance of each from the trained model; the written one is measured on its files.
        base: Distance of the NF4 base without an adapter, for a yardstick.
        loss: Of the trained model, nats per token.
        num_rows, num_tokens: What it was measured on; tokens that were trained.
        origin: Where the rows are from.
        streamed: Whether weights were fetched layer by layer, since the model does not fit in memory.
    """

    strategies: dict[str, Distance]
    base: Distance
    loss: float
    num_rows: int
    num_tokens: int
    origin: str
    streamed: bool

    def as_dict(self) -> dict[str, Any]:
        """For a report: all but the strategies."""
        return {
            "rows": self.num_rows,
            "tokens": self.num_tokens,
            "rows_from": self.origin,
            "reference_loss": self.loss,
            "no_adapter": self.base.as_dict(),
            "streamed": self.streamed,
        }


def evidence(
    plan: Plan, written: Path, rows: ProofRows, policy: PrecisionPolicy, say: Callable[[str], None]
) -> Evidence:
    """Measure every strategy.

    Args:
        plan: What was merged.
        written: The folder with the chosen one's weights, which are read back.
        rows: What to measure on.
        policy: float32, and the device.
        say: Takes a line for a person.
    """
    say(f"proof on {policy.device}, {rows.origin}: NF4 base + adapter")
    reference, base = _trained(plan, rows, policy)
    gc.collect()  # modules refer to each other: the trained model would stay until Python happens to look
    num_bytes = 4 * sum(torch.Size(shape).numel() for shape in plan.merge.base.shapes.values())
    keep = num_bytes < available_bytes(policy.device) / 2
    if not keep:
        say(f"the model takes {sized(num_bytes)} in float32: each strategy is read layer by layer, which takes a while")
    found = {}
    for strategy in plan.merge.strategies:
        say(f"proof: {strategy}")
        model = Streamed(skeleton(plan.config), _weights(plan, strategy, written), policy.device, keep=keep)
        found[strategy] = distance(model, reference, policy.device)
        model.close()
    return Evidence(found, base, reference.loss, len(reference.rows), reference.num_tokens, rows.origin, not keep)


def _trained(plan: Plan, rows: ProofRows, policy: PrecisionPolicy) -> tuple[Reference, Distance]:
    """What the trained model says, loaded as anyone loads it: bitsandbytes' layers, PEFT's adapter."""
    model = with_adapter(nf4_base_of(plan.folder, policy), plan.folder)

    @torch.no_grad()
    def forward(**inputs: Tensor) -> Tensor:
        return model(**inputs, use_cache=False).logits

    reference = reference_of(forward, rows.rows, model.config.get_text_config().vocab_size, policy.device)
    with model.disable_adapter():
        return reference, distance(forward, reference, policy.device)


def _weights(plan: Plan, strategy: str, written: Path) -> Callable[[str], Tensor]:
    if strategy != plan.strategy:
        return lambda name: plan.merge.loaded(name, strategy, plan.dtype)
    files = Checkpoint(written, AutoConfig.from_pretrained(written, **NOT_RUN), str(written))
    return files.weight
