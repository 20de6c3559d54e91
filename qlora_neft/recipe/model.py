"""The sections ``model``, ``quantization`` and ``lora``: the frozen base, how it is stored, and what is trained."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..paths import kind_of
from .section import Count, Positive, Section, Text, broken_rule


class Model(Section):
    """The base model, whose weights are never changed."""

    name_or_path: Text = Field(description="Hub id, local folder, or bundled:NAME")
    revision: Text = Field("main", description="branch, tag or commit, for a model on the Hub")
    adapter: Text | None = Field(
        None, description="adapter to go on from, a folder or Hub id: base and LoRA settings are taken from it"
    )
    adapter_revision: Text | None = Field(None, description="branch, tag or commit, for an adapter on the Hub")

    @field_validator("adapter_revision")
    @classmethod
    def _only_with_an_adapter(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("adapter", value) is None:
            raise broken_rule(f"has no effect without model.adapter, got {value!r}. Remove it.", involves=("adapter",))
        return value

    @field_validator("revision")
    @classmethod
    def _only_on_the_hub(cls, value: str, info: ValidationInfo) -> str:
        path = info.data.get("name_or_path")
        if value != "main" and path is not None and kind_of(path) != "hub":
            raise broken_rule(
                f"has an effect only on a model from the Hub, and model.name_or_path is {path!r}, got {value!r}. "
                "Remove it.",
                involves=("name_or_path",),
            )
        return value


class Quantization(Section):
    """How the frozen base is stored."""

    bnb_4bit_quant_type: Literal["nf4"] = Field("nf4", description="4-bit data type of the weights")
    # 32/64 bits per weight become 8/64 + 32/(64 * 256): section 3 of the QLoRA paper.
    bnb_4bit_use_double_quant: bool = Field(
        True, description="quantize the scales too, which saves 0.37 bits per weight"
    )
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype that 4-bit weights are dequantized to; auto: by device"
    )

    min_nf4_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.9, description="least share of the block weights in NF4, else the base is refused"
    )

    @field_validator("bnb_4bit_quant_type", mode="before")
    @classmethod
    def _no_fp4(cls, value: Any) -> Any:
        if value == "fp4":
            raise broken_rule("the frozen base is stored as NF4, got 'fp4'. Write nf4.")
        return value


class Lora(Section):
    """The adapter: all that is trained."""

    r: Count = Field(description="rank of the update")
    # Both types, so that 16 stays a whole number in PEFT's configuration.
    lora_alpha: Count | Positive = Field(description="the update is scaled by lora_alpha / r; see use_rslora")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(description="dropout probability on the adapter's input")
    target_modules: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)] = Field(
        description="all linear layers except the output, or a list of layer names"
    )
    use_rslora: bool = Field(
        False, description="scale the update by lora_alpha / sqrt(r) instead (rank-stabilized LoRA, for high ranks)"
    )

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return lora_scale(self.lora_alpha, self.r, use_rslora=self.use_rslora)


def lora_scale(lora_alpha: float, r: int, *, use_rslora: bool) -> float:
    """Return what PEFT multiplies B A by.

    Source: Hu et al. 2021, LoRA, section 4.1, arXiv:2106.09685; with the square root Kalajdzievski 2023,
    rank-stabilized LoRA, arXiv:2312.03732.
    """
    return lora_alpha / (math.sqrt(r) if use_rslora else r)
