"""Whether rows are padded or flattened, and which attention keeps flattened sequences apart.

Which families may be flattened, `qlora_neft.base.flattening` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING

import torch

from ..base.flattening import FLASH, OURS, PER_SEQUENCE, VARLEN, flattening_is_wanted, probed, why_padded
from ..errors import UserInputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTIONS = ("auto", "sdpa", "eager", *OURS, *FLASH)
MAX_HEAD_DIM = 256  # FlashAttention's


@dataclass(frozen=True)
class AttentionChoice:
    """How a run's rows are laid out, and attended over.

    Attributes:
        padding_free: Whether rows are flattened.
        flattened: Attention of flattened batches, one of `ATTENTIONS`; "auto" for the model's own.
        model: Attention of the model otherwise, as transformers names it; "auto" for transformers' choice.
        note: What was not possible, in one line; or "".
    """

    padding_free: bool
    flattened: str
    model: str
    note: str = ""

    @property
    def implementation(self) -> str:
        """The attention of training passes."""
        return self.flattened if self.padding_free and self.flattened != "auto" else self.model


def choose_attention(
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    padding_free: bool | None = None,
    implementation: str = "auto",
    packed: bool = False,
) -> AttentionChoice:
    """Decide whether rows are flattened, and how they are attended over.

    Left open, rows are flattened with CUDA, where a model family allows it, and padded on a CPU, whose kernels are
    slower on many short sequences than on one padded rectangle.

    Args:
        config: The model's configuration.
        device: Device of the model.
        dtype: Dtype that attention computes in.
        padding_free: Whether to flatten; None decides.
        implementation: One of `ATTENTIONS`.
        packed: Whether rows hold several sequences already, so that they cannot be padded.

    Raises:
        UserInputError: If what is asked for contradicts itself, does not run here, or would mix packed sequences.
    """
    _check(implementation, config, device, dtype, padding_free=padding_free, packed=packed)
    model = "auto" if implementation in OURS else implementation
    on_cuda = device.type == "cuda"
    if not packed and not flattening_is_wanted(padding_free, implementation, on_cuda=on_cuda):
        return AttentionChoice(False, "auto", model)
    why = why_padded(config.to_dict())
    by_masks = _family(config) in probed()["kept_apart_by_masks"]
    if not why and (by_masks or implementation not in ("sdpa", "eager")):
        if implementation != "auto":
            return AttentionChoice(True, implementation, model)
        if varlen_runs(device, dtype, head_dim_of(config)):
            return AttentionChoice(True, VARLEN, model)
        if _flash_runs(device, dtype):
            return AttentionChoice(True, FLASH[0], FLASH[0])
        return AttentionChoice(True, PER_SEQUENCE, model)
    # Only for those who ask: a mask over the whole flattened row costs more than padding.
    if (packed or padding_free) and by_masks:
        return AttentionChoice(
            True, "auto", model, f"flattened rows are kept apart by a mask over the whole row: {why}"
        )
    if packed and _family(config) in probed()["padded"]:
        raise UserInputError(f"packing: not possible with {_family(config)!r}: {why}. Set packing=False.")
    if packed:
        return AttentionChoice(True, "auto", model, f"packed sequences may see each other: {why}")
    return AttentionChoice(False, "auto", model, f"rows are padded: {why}")


def varlen_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether torch's kernel for sequences of varying length runs here."""
    if not _is_half_on_ampere(device, dtype) or "window_size" not in varlen_arguments():
        return False
    return head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


@cache
def varlen_arguments() -> frozenset[str]:
    """Return the arguments of torch's kernel, none without one: scale and window came with torch 2.11, heads later."""
    if find_spec("torch.nn.attention.varlen") is None:  # before torch 2.10
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(signature(varlen_attn).parameters)


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the width of a head's queries; that of DeepSeek's latent attention is the sum of its two parts."""
    text = config.get_text_config()
    if (plain := getattr(text, "qk_nope_head_dim", None)) is not None:
        return plain + text.qk_rope_head_dim
    return getattr(text, "head_dim", None) or math.ceil(text.hidden_size / text.num_attention_heads)


def _check(
    implementation: str,
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    padding_free: bool | None,
    packed: bool,
) -> None:
    if implementation not in ATTENTIONS:
        raise UserInputError(f"attn_implementation: must be one of {', '.join(ATTENTIONS)}, got {implementation!r}.")
    if implementation in OURS and padding_free is False and not packed:
        raise UserInputError(
            f"attn_implementation: {implementation} attends over flattened rows, got padding_free: false. Write auto, "
            "or leave padding_free out."
        )
    where = f"{device.type} in {str(dtype).removeprefix('torch.')}"
    if implementation == VARLEN and not varlen_runs(device, dtype, head_dim_of(config)):
        raise UserInputError(
            "attn_implementation: varlen needs a GPU of compute capability 8.0, bf16 or fp16, and heads no wider than "
            f"{MAX_HEAD_DIM}, got {where}, heads of {head_dim_of(config)}. Write auto, or {PER_SEQUENCE}."
        )
    if implementation in FLASH and not _is_half_on_ampere(device, dtype):
        raise UserInputError(
            f"attn_implementation: {implementation} needs a GPU of compute capability 8.0 and bf16 or fp16, got "
            f"{where}. Write auto."
        )


def _family(config: PreTrainedConfig) -> str:
    return config.get_text_config().model_type


def _is_half_on_ampere(device: torch.device, dtype: torch.dtype) -> bool:
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_runs(device: torch.device, dtype: torch.dtype) -> bool:
    return _is_half_on_ampere(device, dtype) and find_spec("flash_attn") is not None
