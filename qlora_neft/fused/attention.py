"""Attention over sequences that lie one behind another in one row, without padding and without a mask.

transformers looks an attention function up by the name in ``config._attn_implementation`` at every call, and builds no
mask for a name it knows no mask of (``transformers.masking_utils``). Two functions are registered here under names of
ours; `FlattenedAttention` puts the name in place for the passes over a flattened batch and takes it away again, so
that padded batches, generation and what is saved know nothing of it.

Where the sequences begin and end comes with the batch: ``cu_seq_lens_q``, which TRL's collator makes, and
``sequence_bounds``, the same numbers on the host. transformers hands both down to the function.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .flattening import OURS, PER_SEQUENCE, VARLEN, varlen_arguments

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

BOUNDS = "sequence_bounds"  # key of a batch: where its sequences begin, and its end, as Python ints


@dataclass
class FlatteningCollator(DataCollatorForLanguageModeling):
    """TRL's collator for flattened rows; its batches also say on the host where their sequences begin.

    On the CPU and once a micro-batch: read from the device, the same numbers would stop it in every layer.
    """

    padding_free: bool = True

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows into one."""
        batch = super().torch_call(examples)
        batch[BOUNDS] = tuple(batch["cu_seq_lens_q"].tolist())
        return batch


class FlattenedAttention:
    """The attention of a model over flattened batches.

    Args:
        model: The model; its text part's configuration is what its attention modules read.
        implementation: ``"varlen"`` or ``"per_sequence"``. Under any other the model attends in its own way:
            transformers' masks keep sequences apart by ``position_ids``, FlashAttention by ``cu_seq_lens_q``.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, implementation: str = "auto") -> None:
        self.config = model.config.get_text_config()
        self.implementation = implementation

    @contextmanager
    def over(self, batch: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Attend by sequence inside the block if the batch is flattened: forward pass, backward pass, recomputation.

        Yields:
            The model's inputs.
        """
        inputs = dict(batch)
        if self.implementation not in OURS or BOUNDS not in inputs:
            inputs.pop(BOUNDS, None)
            yield inputs
            return
        if self.implementation == VARLEN:
            del inputs[BOUNDS]  # torch's kernel reads the device's; compiled blocks would be compiled for each
        usual = self.config._attn_implementation
        # An attribute of the configuration and no context variable: autograd's threads recompute blocks under it too.
        self.config._attn_implementation = registered_name(self.implementation)
        try:
            yield inputs
        finally:
            self.config._attn_implementation = usual


def registered_name(implementation: str) -> str:
    """Return the name that one of our implementations is registered under with transformers."""
    return f"qlora_neft_{implementation}"


# ---- The two functions, as transformers calls them ----


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by one kernel that reads the bounds on the device (`torch.nn.attention.varlen`).

    Args:
        module: The attention module.
        query: (1, H, T, D).
        key: (1, H_kv, T, D).
        value: (1, H_kv, T, D_v).
        attention_mask: None.
        dropout: 0; as the next, here to be refused.
        scaling: Factor of the scores; None for 1 / sqrt(D).
        sliding_window: Tokens that a token sees, itself included; None for all before it.
        cu_seq_lens_q: Where sequences begin, and the end, (N + 1,), int32, on the device.
        max_length_q: Tokens of the longest sequence.
        kwargs: What else transformers hands down.

    Returns:
        (1, T, H, D_v), and no weights.
    """
    _refuse(module, query, attention_mask, dropout, kwargs)
    if cu_seq_lens_q is None or max_length_q is None:
        raise _no_bounds()
    assert varlen_attn is not None, "asked by `varlen_runs` before"
    target = _half(query)
    # (T, H, D), views. The kernel wants one width for all three.
    q, k, v = (x[0].transpose(0, 1).to(target) for x in (query, key, value))
    value_dim = v.shape[-1]
    if value_dim < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - value_dim))
    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in varlen_arguments():
            grouped = {"enable_gqa": True}
        else:  # torch 2.11 and 2.12 may know grouped queries, and have no way to say so
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        # Tokens to the left of a token's own, and to its right.
        window_size=(-1, 0) if _window(sliding_window, max_length_q) is None else (sliding_window - 1, 0),  # ty: ignore[unsupported-operator]
        **grouped,
    )
    assert isinstance(out, Tensor)  # a tuple only if more is asked for
    return out[..., :value_dim][None], None


@torch.compiler.disable  # it would be compiled anew for every split into sequences
def per_sequence_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sequence_bounds: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by ordinary calls on slices, one for each run of sequences of one length; runs on every device.

    Args:
        module: As the next, as in `varlen_attention`.
        query: (1, H, T, D).
        key: (1, H_kv, T, D).
        value: (1, H_kv, T, D_v).
        attention_mask: None.
        dropout: 0.
        scaling: Factor of the scores; None for 1 / sqrt(D).
        sliding_window: Tokens that a token sees, itself included; None for all before it.
        sequence_bounds: Where sequences begin, and the end, on the host.
        kwargs: What else transformers hands down.

    Returns:
        (1, T, H, D_v), and no weights.
    """
    _refuse(module, query, attention_mask, dropout, kwargs)
    if sequence_bounds is None:
        raise _no_bounds()
    # Before the slices: once for the row instead of once a sequence.
    key, value = _for_every_head(key, query.shape[1]), _for_every_head(value, query.shape[1])
    parts = []
    for start, length, count in runs_of_one_length(tuple(sequence_bounds)):
        q, k, v = (_as_batch(x, start, length, count) for x in (query, key, value))  # (count, H, L, D), views
        window = _window(sliding_window, length)
        mask = None if window is None else causal_window(length, window, query.device)
        part = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        parts.append(part.transpose(1, 2).flatten(0, 1))  # (count * L, H, D_v)
    return torch.cat(parts)[None], None


AttentionInterface.register(registered_name(VARLEN), varlen_attention)
AttentionInterface.register(registered_name(PER_SEQUENCE), per_sequence_attention)


# ---- Their parts ----


@lru_cache(maxsize=64)  # every layer of a pass asks for the same
def runs_of_one_length(bounds: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return start, length and number of the sequences of each run of neighbours of one length."""
    runs, start = [], bounds[0]
    for length, group in groupby(b - a for a, b in pairwise(bounds)):
        count = len(list(group))
        runs.append((start, length, count))
        start += length * count
    return runs


@lru_cache(maxsize=4)
def causal_window(length: int, window: int, device: torch.device) -> Tensor:
    """Return which tokens each token sees: itself and the ``window - 1`` before it, (L, L), bool."""
    place = torch.arange(length, device=device)
    behind = place[:, None] - place[None, :]
    return (behind >= 0) & (behind < window)


def _window(sliding_window: int | None, length: int) -> int | None:
    """Return the window if any token of a sequence has more than that before it."""
    return sliding_window if sliding_window is not None and sliding_window < length else None


def _as_batch(x: Tensor, start: int, length: int, count: int) -> Tensor:
    """Return ``count`` neighbours of one length from a row (1, H, T, D) as (count, H, L, D)."""
    return x[0, :, start : start + length * count].unflatten(1, (count, length)).transpose(0, 1)


def _for_every_head(x: Tensor, num_heads: int) -> Tensor:
    """Repeat the heads of (1, H_kv, T, D): outside FlashAttention, grouped queries have few kernels."""
    groups = num_heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _half(query: Tensor) -> torch.dtype:
    """Return the dtype to attend in: a float32 query under autocast is rounded, as it is for torch's own attention."""
    if query.dtype == torch.float32 and torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype


def _refuse(
    module: nn.Module, query: Tensor, attention_mask: Tensor | None, dropout: float, kwargs: Mapping[str, Any]
) -> None:
    """Raise rather than compute something else than the model asks for; `.flattening` keeps such models away."""
    extras = [name for name in ("softcap", "s_aux", "position_bias", "sinks") if kwargs.get(name) is not None]
    extras += ["dropout"] * bool(dropout) + ["a mask"] * (attention_mask is not None)
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        extras.append("attention that is not causal")
    if query.shape[0] != 1:
        extras.append(f"a batch of {query.shape[0]} rows")
    if extras:
        raise NotImplementedError(f"attention by sequence does not know {', '.join(extras)}")


def _no_bounds() -> NotImplementedError:
    return NotImplementedError("the model does not hand down where the sequences of a flattened batch begin")
