"""How the rows of a trainer are laid out and attended over: its arguments and its model put together."""

from __future__ import annotations

from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import UserInputError, first_line
from ..fused.flattening import AttentionChoice, choose_attention
from .config import QLoRANeftConfig


def attention_of(model: PreTrainedModel | PeftModel, args: QLoRANeftConfig, *, given_collator: bool) -> AttentionChoice:
    """Choose how rows are laid out and attended over, and set the model's own attention.

    Args:
        model: The model, with its adapters.
        args: What was asked for.
        given_collator: Whether a collator of the caller's pads or flattens as it likes.
    """
    choice = choose_attention(
        model.config,
        args.device,
        args.compute_dtype,
        padding_free=False if given_collator else args.padding_free,
        implementation=args.attn_implementation,
        packed=bool(args.packing) and args.packing_strategy != "wrapped",
    )
    if choice.model not in ("auto", model.config._attn_implementation):
        base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        try:
            base.set_attn_implementation(choice.model)
        except (ImportError, ValueError) as error:
            raise UserInputError(
                f"attn_implementation: {choice.model} does not run here. ({first_line(error)})"
            ) from error
    return choice
