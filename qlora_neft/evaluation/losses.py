"""Losses of a base and its adapter on sets of sequences, without noise or dropout (NEFTune's Figure 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from ..adapter.load import Trained
from ..base.precision import PrecisionPolicy
from ..display.tables import short_names
from ..errors import UserInputError
from ..steps.losses import mean_token_loss
from ..steps.sequences import IGNORE_INDEX

SLICE = 1024  # sequences held in memory at a time, sorted by length among themselves


@dataclass(frozen=True)
class SetLoss:
    """A mean over all trained tokens of a set.

    Attributes:
        loss: Nats per trained token.
        tokens: Trained tokens.
        rows: Sequences.
    """

    loss: float
    tokens: int
    rows: int


def prepare_for_losses(trained: Trained) -> None:
    """Give the model TRL's fused head, as the trainer has it, so that full logits are never built; once per model."""
    add_fused_lm_head(trained.model.get_base_model())


def set_loss(
    trained: Trained,
    rows: Any,
    *,
    batch_size: int,
    base_alone: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SetLoss:
    """Mean negative log-likelihood of a set's trained tokens, whatever the batches.

    Args:
        trained: After `prepare_for_losses`.
        rows: A dataset of ``input_ids`` and ``labels`` with at least one row.
        batch_size: Sequences at a time.
        base_alone: Without the adapter.
        progress: Told how many sequences are done, of how many.
    """
    collator = DataCollatorForLanguageModeling(pad_token_id=trained.tokenizer.pad_token_id)
    total, tokens = 0.0, 0
    with trained.base_alone() if base_alone else nullcontext(), _autocast(trained.policy):
        for start in range(0, len(rows), SLICE):
            part = rows.select(range(start, min(start + SLICE, len(rows))))
            features = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in part]
            features.sort(key=lambda row: len(row["input_ids"]))
            count = _trained_tokens(features)
            if count:
                loss = mean_token_loss(trained.model, features, collator, batch_size, trained.policy.device)
                total, tokens = total + loss * count, tokens + count
            progress(start + len(features), len(rows))
    return SetLoss(total / tokens if tokens else float("nan"), tokens, len(rows))


def _trained_tokens(features: Sequence[dict[str, Any]]) -> int:
    """Labels that count; nothing predicts the first token."""
    return sum(label != IGNORE_INDEX for row in features for label in row["labels"][1:])


def _autocast(policy: PrecisionPolicy) -> Any:
    """As in training."""
    if policy.amp == "no":
        return nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[policy.amp]
    return torch.autocast(policy.device.type, dtype=dtype)


RESERVED = ("train", "held out")


def named_sets(written: Sequence[str]) -> dict[str, str]:
    """``NAME=FILE`` or ``FILE`` as path by name; a file without a name is called after itself.

    Raises:
        UserInputError: If two sets have one name, or one is empty.
    """
    found: dict[str, str] = {}
    for text in written:
        name, path = text.split("=", 1) if "=" in text and not Path(text).exists() else (Path(text).stem, text)
        if not name or not path:
            raise UserInputError(f"--data: must be FILE or NAME=FILE, got {text!r}.")
        if name in found or name in RESERVED:
            raise UserInputError(f"--data: there is a set {name!r} already. Give it another name: NAME={path}.")
        found[name] = path
    return found


def loss_table(found: Sequence[dict[str, Any]], sources: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: a set a row, base and adapters in columns."""
    rows = []
    for entry in found:
        losses = [entry["base"], *(entry["adapters"].get(source) for source in sources)]
        counts = [f"{entry['rows']:,}", f"{entry['tokens']:,}"]
        rows.append([entry["set"], *counts, *("-" if loss is None else f"{loss:.4f}" for loss in losses)])
    return ["nats per trained token", "rows", "tokens", "base", *short_names(sources)], rows
