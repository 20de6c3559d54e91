"""How far a merged model is from the one that was trained: KL divergence, top-1 agreement, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..steps.batch import IGNORE_INDEX

KL_LIMIT = 1e-3  # nats per token; the default merge measures 1e-6 to 1e-4
MAX_LOGITS = 2**28  # numbers kept of the trained model's logits, and made in one pass: 1 GiB in float32
CHUNK = 2**23  # logits compared at a time, in float64


@dataclass(frozen=True)
class Distance:
    """Means over the trained tokens of the rows.

    Attributes:
        kl: KL(trained model || this one), nats per token.
        top1: Share of tokens at which both hold the same token the likeliest.
        loss: Negative log-likelihood of the rows, nats per token.
    """

    kl: float
    top1: float
    loss: float

    def as_dict(self) -> dict[str, float]:
        """For a report."""
        return asdict(self)


@dataclass
class Reference:
    """What the trained model says of some rows.

    Attributes:
        rows: Of ``input_ids`` and ``labels``.
        batches: Indices of rows that are computed together.
        logits: Of each batch's trained tokens, (N, V) on the CPU.
        loss: Mean negative log-likelihood, nats per token.
    """

    rows: Sequence[dict[str, Any]]
    batches: list[list[int]]
    logits: list[Tensor] = field(default_factory=list)
    loss: float = float("nan")

    @property
    def num_tokens(self) -> int:
        """Trained tokens."""
        return sum(len(logits) for logits in self.logits)


def reference_of(
    forward: Callable[..., Tensor], rows: Sequence[dict[str, Any]], vocab_size: int, device: torch.device
) -> Reference:
    """Let the trained model read as many of the rows as there is room for its answer.

    Args:
        forward: Logits (B, T, V) of ``input_ids`` and ``attention_mask``.
        rows: Of ``input_ids`` and ``labels``.
        vocab_size: V.
        device: Where inputs go.
    """
    rows = _within(rows, MAX_LOGITS // vocab_size)
    found = Reference(rows, list(_batches([len(row["input_ids"]) for row in rows], MAX_LOGITS // vocab_size)))
    targets = []
    for batch in found.batches:
        logits, labels = _at_trained_tokens(forward, [rows[i] for i in batch], device)
        found.logits.append(logits.cpu())
        targets.append((found.logits[-1], labels.cpu()))
    total = sum(_losses(logits, labels).sum().item() for logits, labels in targets)
    found.loss = total / found.num_tokens
    return found


def distance(forward: Callable[..., Tensor], reference: Reference, device: torch.device) -> Distance:
    """Compare a model with the trained one; arguments as in `reference_of`."""
    kl = same = loss = 0.0
    for batch, trained in zip(reference.batches, reference.logits, strict=True):
        logits, labels = _at_trained_tokens(forward, [reference.rows[i] for i in batch], device)
        for ours, theirs, targets in _chunks(logits, trained.to(device), labels):
            p, q = log_softmax(theirs.double(), -1), log_softmax(ours.double(), -1)
            kl += (p.exp() * (p - q)).sum().item()
            same += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
            loss -= q.gather(-1, targets[:, None]).sum().item()
    count = reference.num_tokens
    return Distance(kl / count, same / count, loss / count)


def _within(rows: Sequence[dict[str, Any]], max_tokens: int) -> list[dict[str, Any]]:
    """The first rows, up to a number of tokens; always one."""
    kept, tokens = [], 0
    for row in rows:
        tokens += len(row["input_ids"])
        if kept and tokens > max_tokens:
            break
        kept.append(row)
    return kept


def _batches(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Rows of like length together, padding counted."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[i] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _at_trained_tokens(
    forward: Callable[..., Tensor], rows: Sequence[dict[str, Any]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits (N, V) before each trained token, and those tokens (N)."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([[*row["input_ids"]] + [0] * (width - len(row["input_ids"])) for row in rows])  # (B, T)
    labels = torch.tensor([[*row["labels"]] + [IGNORE_INDEX] * (width - len(row["labels"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    logits = forward(input_ids=ids.to(device), attention_mask=mask.to(device))
    targets = labels[:, 1:].to(device)
    trained = targets != IGNORE_INDEX
    return logits[:, :-1][trained].float(), targets[trained]


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    parts = [-log_softmax(x.double(), -1).gather(-1, y[:, None])[:, 0] for x, _, y in _chunks(logits, logits, labels)]
    return torch.cat(parts)


def _chunks(ours: Tensor, theirs: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    size = max(1, CHUNK // ours.shape[-1])
    yield from zip(ours.split(size), theirs.split(size), labels.split(size), strict=True)
