"""How far a merged model is from the one that was trained: KL divergence, top-1 agreement, loss."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
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
from ...steps.sequences import IGNORE_INDEX
from .plan import DEQUANTIZED, NF4, ORIGINAL, Plan

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


class Streamed:
    """Computes with a skeleton whose weights come, one module at a time, from a function.

    Args:
        model: Without weights, see `checkpoint.skeleton`; to be used by this object alone.
        weight: A parameter's value by its name, float32.
        device: Where it computes.
        keep: Whether weights stay once they are fetched; else each is dropped after its use.
    """

    def __init__(
        self, model: PreTrainedModel, weight: Callable[[str], Tensor], device: torch.device, *, keep: bool
    ) -> None:
        self.model, self._weight, self._device, self._keep = model, weight, device, keep
        for prefix, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
            names = [name for name, _ in module.named_parameters(recurse=False)]
            if names:
                self._attach(module, {name: f"{prefix}.{name}" if prefix else name for name in names})

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Tensor:
        """Logits, (B, T, V), float32."""
        return self.model(**inputs, use_cache=False).logits

    def close(self) -> None:
        """Drop every weight."""
        for module in self.model.modules():
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                _drop(module, name)

    def _attach(self, module: nn.Module, names: dict[str, str]) -> None:
        def fetch(*_: Any) -> None:
            for own, full in names.items():
                if module._parameters[own].is_meta:
                    value = self._weight(full).to(self._device, torch.float32)
                    module._parameters[own] = nn.Parameter(value, requires_grad=False)

        def drop(*_: Any) -> None:
            for own in () if self._keep else names:
                _drop(module, own)

        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)


def _drop(module: nn.Module, name: str) -> None:
    module._parameters[name] = nn.Parameter(module._parameters[name].to("meta"), requires_grad=False)


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


MEANING = {
    DEQUANTIZED: "NF4 base, dequantized: what was trained",
    ORIGINAL: "original base",
    NF4: "quantized again, as merge_and_unload does in 4 bit",
}


def table(report: dict[str, Any]) -> list[str]:
    """The strategies' distances from the trained model, and what a merge is measured by."""
    proof = report["proof"]
    rows = [["", "KL", "top-1", "loss", ""], ["trained model", "0", "100%", f"{proof['reference_loss']:.4f}", ""]]
    for name, values in report["strategies"].items():
        mark = " <" if name == report["chosen"] else ""
        rows.append([f"{name}{mark}", *_numbers(values), MEANING[name]])
    rows.append(["no adapter", *_numbers(proof["no_adapter"]), "NF4 base alone, for comparison"])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    measured_on = f"{proof['tokens']} trained tokens of {proof['rows']} rows ({proof['rows_from']})"
    found = [f"against NF4 base + adapter in float32, on {measured_on}; KL and loss in nats per token"]
    for name, *numbers, meaning in rows:
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)), meaning]
        found.append("  ".join(cells).rstrip())
    return found


def lines(report: dict[str, Any], out: Path) -> list[str]:
    """All that is said at the end of a merge that is done."""
    size = f"{report['dtype']}, {sized(report['bytes'])}"
    if report["proof"] is None:
        return [f"{out}: merged without proof ({size})"]
    kl = report["strategies"][report["chosen"]]["kl"]
    found = [*table(report), f"{out}: merged, {report['chosen']}, {size}"]
    if kl is None or kl > report["kl_limit"]:
        measured = "not finite" if kl is None else f"{kl:.2g}, more than {report['kl_limit']:g}"
        found.append(
            f"warning: {report['chosen']} is not the model that was trained (KL {measured}). "
            f"The default, --strategy {DEQUANTIZED}, is."
        )
    return found


def sized(num_bytes: int) -> str:
    """A size as people write it."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _numbers(values: dict[str, Any]) -> list[str]:
    kl, top1, loss = (values[name] for name in ("kl", "top1", "loss"))
    return ["-" if kl is None else f"{kl:.2g}", f"{top1:.2%}", "-" if loss is None else f"{loss:.4f}"]


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


@dataclass(frozen=True)
class ProofRows:
    """Tokenized rows.

    Attributes:
        rows: Of ``input_ids`` and ``labels``.
        origin: Where they are from, for a person.
    """

    rows: list[dict[str, Any]]
    origin: str
