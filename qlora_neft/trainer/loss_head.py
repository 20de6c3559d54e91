"""The loss that is trained on must be the model's own: compared on one row before the first step.

TRL multiplies the backbone's last hidden states by the output embedding itself, with those soft caps and scales whose
names it knows (``trl.trainer.utils.add_fused_lm_head``). A prediction head between the two, or a cap under another
name, would be left out silently. Where that makes a difference, logits are taken from the model's own forward pass.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from ..errors import UserInputError
from ..steps import IGNORE_INDEX
from ..steps.losses import evaluating

FUSED, PLAIN = "fused", "plain"
MAX_TOKENS = 32  # of the row that is compared
# Relative difference of two mean losses, by the coarsest format in the computation. recurrent_gemma's soft cap, which
# TRL does not know, moves the loss of a random model by 1.2e-4.
TOLERANCE = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Logits are also compared when scaled up to this: soft caps bend large ones only, which a model learns to make.
LARGE_LOGIT = 30.0
CHUNK = 2**24  # logits whose entropy is computed at a time: 64 MiB in float32


class FusedHeadFails(Exception):
    """TRL's fused head does not run on this model."""


@dataclass(frozen=True)
class LossCheck:
    """What one row says of the loss.

    Attributes:
        head: ``"fused"`` if TRL's fused head computes the model's loss, else ``"plain"``, the model's own forward pass.
        model_loss: Loss of the model's own logits, nats per token.
        fused_loss: Loss of TRL's fused head; NaN if it does not run on this model.
    """

    head: str
    model_loss: float
    fused_loss: float

    def __str__(self) -> str:
        if self.head == FUSED:
            return f"loss: {self.model_loss:.5f} on one row, by the model's own logits and by the fused head alike"
        if math.isnan(self.fused_loss):
            return "loss: the fused head does not run on this model; training on its own logits, which takes memory"
        return (
            f"loss: the fused head gives {self.fused_loss:.5f} where the model's own logits give {self.model_loss:.5f} "
            "(or differs once logits are large); training on the model's own, which takes memory for all logits"
        )


def settle_loss_head(
    model: PreTrainedModel | PeftModel,
    token_ids: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    autocast: AbstractContextManager,
) -> LossCheck:
    """Compare the training loss with that of the model's logits; take the plain head where they differ.

    Args:
        model: With TRL's fused head. Left as it was, but for the head.
        token_ids: The row; at least two tokens.
        device: Device of the model.
        dtype: Coarsest format of the computation, which decides the tolerance.
        autocast: As in training.

    Raises:
        UserInputError: If the model sees tokens after the one it predicts, or its loss cannot be computed twice alike.
    """
    ids = torch.tensor([list(token_ids)[:MAX_TOKENS]], device=device)
    base = cast("PreTrainedModel", model.get_base_model()) if isinstance(model, PeftModel) else model
    with evaluating(model), autocast:
        try:
            own, fused = _losses(model, ids, dtype)
            if _alike(own, fused, dtype) and all(_alike(*pair, dtype) for pair in _large(model, base, ids, dtype)):
                return LossCheck(FUSED, own, fused)
        except FusedHeadFails:
            fused = math.nan
        use_plain_head(base)
        own, plain = _losses(model, ids, dtype)
        again, _ = _losses(model, ids, dtype)
        if not (_alike(own, plain, dtype) and _alike(own, again, dtype)):
            raise UserInputError(
                f"model.name_or_path: the loss of {type(base).__name__} cannot be trained on: its logits give "
                f"{own:.5f} and {again:.5f} on one row, its training loss is {plain:.5f}. Choose another base."
            )
    return LossCheck(PLAIN, own, fused)


def use_plain_head(model: PreTrainedModel) -> None:
    """Let ``model(..., fused_lm_head=True)`` take its log-probabilities from the model's own logits.

    It returns what TRL's fused head does, which it replaces on this one model.
    """
    own_forward = type(model).forward

    # Keep the signature: `generate` checks its arguments against it.
    @functools.wraps(own_forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return own_forward(self, *args, **kwargs, **({} if labels is None else {"labels": labels}))
        kwargs.pop("num_items_in_batch", None)
        outputs = own_forward(self, *args, **{**kwargs, "use_cache": False})
        return _as_fused(outputs, labels)

    model.forward = types.MethodType(forward, model)


def _as_fused(outputs: Any, labels: Tensor) -> FusedCausalLMOutput:
    """Return log-probability, entropy and hit of every labelled token, (B, T - 1) each, zero where there is none."""
    targets = labels[:, 1:].to(outputs.logits.device)  # (B, T - 1)
    mask = targets != IGNORE_INDEX
    logits = outputs.logits[:, :-1][mask].float()  # (N, V)
    found = -cross_entropy(logits, targets[mask], reduction="none")
    with torch.no_grad():
        entropy = torch.cat([_entropy(part) for part in _chunks(logits)])
        hits = logits.argmax(dim=-1) == targets[mask]

    def placed(values: Tensor) -> Tensor:
        # masked_scatter keeps the graph where no token has a label: the gradient is zero, not missing.
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    log_probs = placed(found)
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / mask.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=placed(entropy),
        is_top1=placed(hits),
        label_mask=mask,
        aux_loss=getattr(outputs, "aux_loss", None),
    )


def _chunks(logits: Tensor) -> Iterator[Tensor]:
    return iter(logits.split(max(1, CHUNK // logits.shape[-1])))


def _entropy(logits: Tensor) -> Tensor:
    log_probs = logits.log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


# ---- The comparison ----


def _losses(model: nn.Module, ids: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the mean loss of a row by the model's own logits, and by ``fused_lm_head=True``; ids are (1, T)."""
    # A second row that ends in another token: nothing before its end may notice.
    other = ids.clone()
    other[0, -1] = ids[0, 0] if ids[0, -1] != ids[0, 0] else (ids[0, -1] + 1) % 7
    both = torch.cat([ids, other])
    inputs = {"input_ids": both, "attention_mask": torch.ones_like(both), "use_cache": False}
    # Counted from the end: prompt tuning puts tokens of its own before the row.
    num_tokens = ids.shape[1] - 1
    logits = model(**inputs).logits[:, -num_tokens - 1 : -1].float()  # (2, T - 1, V)
    _check_causal(model, logits, dtype)
    own = cross_entropy(logits[0], ids[0, 1:])
    try:
        log_probs = model(**inputs, labels=both, fused_lm_head=True).log_probs[0, -num_tokens:]
    except (AttributeError, TypeError, ValueError, KeyError) as error:  # no backbone of its own, no such configuration
        raise FusedHeadFails(str(error)) from error
    return own.item(), -log_probs.float().mean().item()


def _check_causal(model: nn.Module, logits: Tensor, dtype: torch.dtype) -> None:
    moved = (logits[0] - logits[1]).abs().max().item()
    if moved > 10 * TOLERANCE[dtype] * max(logits.abs().max().item(), 1.0):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        raise UserInputError(
            f"model.name_or_path: {type(base).__name__} is no causal language model as it is configured: what it "
            f"predicts depends on later tokens (its logits move by {moved:.2g}). Choose a decoder such as Llama, "
            "Mistral, Qwen or Gemma."
        )


def _large(
    model: nn.Module, base: PreTrainedModel, ids: Tensor, dtype: torch.dtype
) -> Generator[tuple[float, float], None, None]:
    """Yield the pair of `_losses` under hidden states scaled up until the logits are large."""
    backbone = base.base_model
    if backbone is base:  # it has no backbone of its own whose output could be scaled
        return
    with _scaled(backbone, 1.0) as seen:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    largest = logits.float().abs().max().item()
    if not seen or not 0 < largest < LARGE_LOGIT:
        return
    with _scaled(backbone, LARGE_LOGIT / largest):
        pair = _losses(model, ids, dtype)
    if all(map(_is_finite, pair)):
        yield pair


@contextmanager
def _scaled(backbone: nn.Module, factor: float) -> Generator[list[bool], None, None]:
    """Multiply a backbone's last hidden states inside the block; the list says whether any went by."""
    seen: list[bool] = []

    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        if getattr(output, "last_hidden_state", None) is not None:
            output.last_hidden_state = output.last_hidden_state * factor
            seen.append(True)
        return output

    handle = backbone.register_forward_hook(scale)
    try:
        yield seen
    finally:
        handle.remove()


def _alike(one: float, other: float, dtype: torch.dtype) -> bool:
    # NaN is alike to nothing, and is the business of the training step, which skips and counts it.
    if not (_is_finite(one) and _is_finite(other)):
        return _is_finite(one) == _is_finite(other)
    return abs(one - other) <= TOLERANCE[dtype] * max(abs(one), 1.0)


def _is_finite(value: float) -> bool:
    return value - value == 0.0
