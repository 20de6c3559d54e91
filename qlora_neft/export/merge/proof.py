"""Proof of a merge: how far the merged model is from the trained one, in KL divergence, top-1 agreement and loss."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import AutoConfig, PreTrainedModel

from ...adapter.load import nf4_base_of, with_adapter
from ...base.checkpoint import Checkpoint, skeleton
from ...base.config import NOT_RUN
from ...base.precision import PrecisionPolicy
from ...steps import IGNORE_INDEX
from ...steps.losses import Rows, pad_right
from .plan import Plan

MAX_LOGITS = 2**28  # logits of the trained model that are kept, and that one forward pass makes: 1 GiB in float32
CHUNK = 2**23  # logits compared at a time, in float64: 64 MiB
Forward = Callable[..., Tensor]  # input_ids and attention_mask, (B, T), to logits, (B, T, V)


@dataclass(frozen=True)
class ProofRows:
    """Tokenized rows to measure on.

    Attributes:
        rows: Each with ``input_ids`` and ``labels``.
        origin: Where they come from, for messages.
    """

    rows: Rows
    origin: str


@dataclass(frozen=True)
class Distance:
    """Distance of a model from the trained one; means over the trained tokens of the rows.

    Attributes:
        kl: KL(trained model || this one), nats per token.
        top1: Share of tokens for which both models find the same token the likeliest.
        loss: Negative log-likelihood of the rows, nats per token.
    """

    kl: float
    top1: float
    loss: float


@dataclass(frozen=True)
class Evidence:
    """Results of a proof.

    Attributes:
        strategies: Distance of each strategy; that of the written one is measured on its files.
        base: Distance of the NF4 base without an adapter, as a yardstick.
        loss: Loss of the trained model, nats per token.
        num_rows: Rows it was measured on.
        num_tokens: Trained tokens in them.
        origin: Where the rows come from, for messages.
        streamed: Whether weights were fetched layer by layer, because the model does not fit in memory.
    """

    strategies: dict[str, Distance]
    base: Distance
    loss: float
    num_rows: int
    num_tokens: int
    origin: str
    streamed: bool


def measure(
    plan: Plan, written: Path, rows: ProofRows, policy: PrecisionPolicy, say: Callable[[str], None]
) -> Evidence:
    """Measure how far every strategy is from the trained model.

    Args:
        plan: What was merged.
        written: Folder with the weights of the chosen strategy, which are read back.
        rows: What to measure on.
        policy: float32, and the device.
        say: Called with progress lines.
    """
    say(f"proof on {policy.device}, {rows.origin}: NF4 base + adapter")
    reference, base = _trained(plan, rows, policy)
    gc.collect()  # modules refer to each other in circles: without this the trained model would stay in memory
    num_bytes = 4 * sum(torch.Size(shape).numel() for shape in plan.merge.base.shapes.values())
    # Half: the other half is for activations and for the logits that are compared.
    keep = num_bytes < _available_bytes(policy.device) / 2
    if not keep:
        say(f"the model takes {sized(num_bytes)} in float32: each strategy is read layer by layer, which takes a while")
    found = {}
    for strategy in plan.merge.strategies:
        say(f"proof: {strategy}")
        model = Streamed(skeleton(plan.config), _weights(plan, strategy, written), policy.device, keep=keep)
        found[strategy] = distance(model, reference, policy.device)
        model.close()
    return Evidence(found, base, reference.loss, len(reference.rows), reference.num_tokens, rows.origin, not keep)


def sized(num_bytes: int) -> str:
    """Format a size for people."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _trained(plan: Plan, rows: ProofRows, policy: PrecisionPolicy) -> tuple[Reference, Distance]:
    """Ask the trained model, loaded as anyone loads it: with bitsandbytes' layers and PEFT's adapter."""
    model = with_adapter(nf4_base_of(plan.folder, policy), plan.folder)

    @torch.no_grad()
    def forward(**inputs: Tensor) -> Tensor:
        return model(**inputs, use_cache=False).logits

    reference = reference_of(forward, rows.rows, model.config.get_text_config().vocab_size, policy.device)
    # The base alone, for a yardstick: how far the adapter itself moves the model.
    with model.disable_adapter():
        return reference, distance(forward, reference, policy.device)


def _weights(plan: Plan, strategy: str, written: Path) -> Callable[[str], Tensor]:
    """Return a function from name to weight: it reads the files of the written strategy, and merges for the others."""
    if strategy != plan.strategy:
        return lambda name: plan.merge.loaded(name, strategy, plan.dtype)
    files = Checkpoint(written, AutoConfig.from_pretrained(written, **NOT_RUN), str(written))
    return files.weight


def _available_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


# ---- Comparing two models ----


@dataclass(frozen=True)
class Reference:
    """Predictions of the trained model on some rows.

    Attributes:
        rows: Each with ``input_ids`` and ``labels``.
        batches: Indices of the rows that are computed together.
        logits: For each batch, the logits of its trained tokens, (N, V), on the CPU.
        loss: Mean negative log-likelihood, nats per token.
    """

    rows: Rows
    batches: list[list[int]]
    logits: list[Tensor]
    loss: float

    @property
    def num_tokens(self) -> int:
        """Number of trained tokens."""
        return sum(len(logits) for logits in self.logits)


def reference_of(forward: Forward, rows: Rows, vocab_size: int, device: torch.device) -> Reference:
    """Record what the trained model says of the first rows, as many as `MAX_LOGITS` allows.

    Args:
        forward: Logits (B, T, V) of ``input_ids`` and ``attention_mask``.
        rows: Each with ``input_ids`` and ``labels``.
        vocab_size: V.
        device: Device for the inputs.
    """
    rows = _within(rows, MAX_LOGITS // vocab_size)
    batches = list(_batches([len(row["input_ids"]) for row in rows], MAX_LOGITS // vocab_size))
    kept, total = [], 0.0
    for batch in batches:
        logits, targets = _at_trained_tokens(forward, [rows[i] for i in batch], device)
        # On the CPU, so that the device's memory is free for the models.
        kept.append(logits.cpu())
        total += _nll(kept[-1], targets.cpu())
    return Reference(rows, batches, kept, total / sum(len(logits) for logits in kept))


def distance(forward: Forward, reference: Reference, device: torch.device) -> Distance:
    """Measure how far a model is from the trained one; arguments as in `reference_of`."""
    kl = same = loss = 0.0
    for batch, trained in zip(reference.batches, reference.logits, strict=True):
        logits, targets = _at_trained_tokens(forward, [reference.rows[i] for i in batch], device)
        for ours, theirs, labels in _chunks(logits, trained.to(device), targets):
            # float64: a faithful merge may measure 1e-6 nats, which float32 sums over V would drown in rounding.
            p, q = log_softmax(theirs.double(), -1), log_softmax(ours.double(), -1)  # (n, V)
            kl += (p.exp() * (p - q)).sum().item()
            same += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
            loss -= q.gather(-1, labels[:, None]).sum().item()
    count = reference.num_tokens
    return Distance(kl / count, same / count, loss / count)


def _within(rows: Rows, max_tokens: int) -> Rows:
    """Return the first rows, up to a number of tokens but always one."""
    tokens = 0
    for count, row in enumerate(rows):
        tokens += len(row["input_ids"])
        if count and tokens > max_tokens:
            return rows[:count]
    return rows


def _batches(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Group rows of similar length, up to a number of tokens with padding."""
    batch: list[int] = []
    # By length, so that a batch is padded little; its last row is its longest, which decides its size.
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[i] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _at_trained_tokens(forward: Forward, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the logits (N, V) that predict each trained token, and those tokens (N,)."""
    inputs = {name: value.to(device) for name, value in pad_right(rows).items()}  # (B, T) each
    # The logits at position t predict the token at t + 1.
    targets = inputs.pop("labels")[:, 1:]
    trained = targets != IGNORE_INDEX
    return forward(**inputs)[:, :-1][trained].float(), targets[trained]


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Negative log-likelihood of some tokens (N,) under logits (N, V), summed."""
    chunks = _chunks(logits, logits, targets)
    parts = [-log_softmax(ours.double(), -1).gather(-1, labels[:, None]) for ours, _, labels in chunks]
    return torch.cat(parts).sum().item()


def _chunks(ours: Tensor, theirs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Split the tokens so that float64 copies of their logits stay small."""
    size = max(1, CHUNK // ours.shape[-1])
    yield from zip(ours.split(size), theirs.split(size), targets.split(size), strict=True)


# ---- A merged model that is larger than memory ----


class Streamed:
    """A skeleton that computes with the weights a function gives.

    Args:
        model: A model without weights, see `skeleton`; nothing else may use it.
        weight: Returns a parameter by its name, in float32.
        device: Device to compute on.
        keep: Whether fetched weights stay; else each is dropped after its module has run.
    """

    def __init__(
        self, model: PreTrainedModel, weight: Callable[[str], Tensor], device: torch.device, *, keep: bool
    ) -> None:
        self.model, self._weight, self._device, self._keep = model, weight, device, keep
        for prefix, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                # Rotary frequencies and the like are computed, not stored: a skeleton has them, on the CPU.
                module._buffers[name] = buffer.to(device)
            names = [name for name, _ in module.named_parameters(recurse=False)]
            if names:
                self._attach(module, {name: f"{prefix}.{name}" if prefix else name for name in names})

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Tensor:
        """Return the logits, (B, T, V), float32."""
        return self.model(**inputs, use_cache=False).logits

    def close(self) -> None:
        """Drop every weight."""
        for module in self.model.modules():
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                _drop(module, name)

    def _attach(self, module: nn.Module, names: dict[str, str]) -> None:
        """Let a module fetch its parameters before it runs; ``names`` has their names in the whole model."""

        def fetch(*_: Any) -> None:
            for own, full in names.items():
                # Fetched once if they are kept; a parameter used twice in a pass is fetched again if not.
                if module.get_parameter(own).is_meta:
                    value = self._weight(full).to(self._device, torch.float32)
                    module._parameters[own] = nn.Parameter(value, requires_grad=False)

        def drop(*_: Any) -> None:
            for own in () if self._keep else names:
                _drop(module, own)

        # Hooks on each module: without `keep`, only the weights of the layer that runs are in memory.
        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)


def _drop(module: nn.Module, name: str) -> None:
    module._parameters[name] = nn.Parameter(module.get_parameter(name).to("meta"), requires_grad=False)
