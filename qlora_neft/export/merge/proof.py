"""Proof of a merge: how far the merged model is from the trained one, in KL divergence, top-1 agreement and loss."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedModel

from ...adapter.load import base_of_adapter, with_adapter
from ...base.checkpoint import Checkpoint, skeleton
from ...base.config import NOT_RUN
from ...base.precision import PrecisionPolicy
from ...errors import RunFailed
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
    say(f"proof on {policy.device}, {rows.origin}: {'NF4 ' if plan.merge.quantized else ''}base + adapter")
    reference, base = _trained(plan, rows, policy)
    gc.collect()  # modules refer to each other in circles: without this the trained model would stay in memory
    num_bytes = 4 * sum(torch.Size(shape).numel() for shape in plan.merge.base.shapes.values())
    # Half: the other half is for activations and for the logits that are compared.
    keep = num_bytes < _available_bytes(policy.device) / 2
    if not keep:
        say(f"the model takes {sized(num_bytes)} in float32: each strategy is read layer by layer, which takes a while")
    files = plan.merge.base
    buffers = {name: files.other(key) for name, key in files.buffers.items()}  # the same in every strategy
    found = {}
    for strategy in plan.merge.strategies:
        say(f"proof: {strategy}")
        weights = _weights(plan, strategy, written)
        model = Streamed(skeleton(plan.config), weights, policy.device, keep=keep, buffers=buffers)
        found[strategy] = distance(model, reference, policy.device)
        model.close()
    return Evidence(found, base, reference.loss, len(reference.rows), reference.num_tokens, rows.origin, not keep)


def sized(num_bytes: int) -> str:
    """Format a size for people."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _trained(plan: Plan, rows: ProofRows, policy: PrecisionPolicy) -> tuple[Reference, Distance]:
    """Ask the trained model, loaded as anyone loads it: with bitsandbytes' layers and PEFT's adapter."""
    model = with_adapter(base_of_adapter(plan.folder, policy), plan.folder)

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

    Weights are fetched block by block, not module by module: convolutions of hybrids, for instance, are read by the
    module around them and never called.

    Args:
        model: A model without weights, see `skeleton`; nothing else may use it.
        weight: Returns a parameter by its name.
        device: Device to compute on.
        keep: Whether fetched weights stay; else those of a block are dropped after it has run.
        buffers: Stored buffers by name, in place of the computed ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weight: Callable[[str], Tensor],
        device: torch.device,
        *,
        keep: bool,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self._weight, self._device = model, weight, device
        # Kept, so that dropping makes no new tensor.
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        for name, buffer in model.named_buffers():
            # Rotary frequencies and the like are computed, not stored: a skeleton has them, on the CPU.
            value = (buffers or {}).get(name, buffer)
            owner, own = self._owner(name)
            owner._buffers[own] = value.to(device, buffer.dtype)
        left = dict.fromkeys(self._empty)
        for prefix, module in () if keep else _fetched_alone(model):
            names = [f"{prefix}.{own}" for own, _ in module.named_parameters(remove_duplicate=False)]
            names = [name for name in names if name in left]
            self._attach(module, names)
            for name in names:
                del left[name]
        if keep:
            self._fetch(left)
        else:
            self._attach(model, list(left))  # there as long as the whole model runs: what reads them is not known

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Tensor:
        """Return the logits, (B, T, V), float32.

        Raises:
            RunFailed: If the model reads a weight that was not fetched, which would make any number meaningless.
        """
        with _EveryWeightIsThere(self._empty):
            return self.model(**inputs, use_cache=False).logits

    def close(self) -> None:
        """Drop every weight."""
        self._drop(self._empty)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, own = name.rpartition(".")
        return self.model.get_submodule(path), own

    def _attach(self, module: nn.Module, names: Sequence[str]) -> None:
        """Let parameters be fetched before a module runs, and dropped after it."""
        module.register_forward_pre_hook(lambda *_: self._fetch(names))
        module.register_forward_hook(lambda *_: self._drop(names))

    def _fetch(self, names: Iterable[str]) -> None:
        for name in names:
            owner, own = self._owner(name)
            value = self._weight(name).to(self._device, torch.float32)
            owner._parameters[own] = nn.Parameter(value, requires_grad=False)

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            owner, own = self._owner(name)
            owner._parameters[own] = self._empty[name]


def _fetched_alone(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose weights are in memory only while they run: blocks, embeddings, the head.

    What is left are norms and small projections.
    """
    blocks = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for name, _ in module.named_children()
    ]
    inside = tuple(f"{block}." for block in blocks)
    for name, module in model.named_modules():
        # A list inside a block, of experts say, belongs to the block.
        if (name in blocks or isinstance(module, (nn.Embedding, nn.Linear))) and not name.startswith(inside):
            yield name, module


class _EveryWeightIsThere(TorchDispatchMode):
    """Refuse every operation on a tensor of the meta device: it has a shape and no numbers."""

    def __init__(self, empty: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._empty = empty

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.is_meta:
                name = next((name for name, p in self._empty.items() if p.shape == value.shape), tuple(value.shape))
                raise RunFailed(
                    f"the proof would read a weight that was not loaded (such as {name}), so it would prove nothing. "
                    "Please report this; --no-proof merges without it."
                )
        return func(*args, **(kwargs or {}))
