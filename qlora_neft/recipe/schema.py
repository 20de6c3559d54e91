"""A whole recipe: its sections, and the rules between them. No torch.

The sections ``model, quantization, lora, neftune, data, train`` state what is learned. ``machine`` states how it is
run, and nothing in it may change what is learned. Types are strict: text is not accepted for a number, nor a number
for true or false. A key that would have no effect is refused, since whoever wrote it expected one.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from .data import Data, MixedSource, is_data_on_the_hub
from .machine import Machine
from .model import Lora, Model, Quantization
from .section import Auto, Section, broken_rule
from .settings import flat, learned
from .train import Neftune, Train

__all__ = [
    "OF_THE_ADAPTER",
    "Auto",
    "Data",
    "Lora",
    "Machine",
    "MixedSource",
    "Model",
    "Neftune",
    "Quantization",
    "Recipe",
    "Section",
    "Train",
]

OF_THE_ADAPTER = "auto"  # model.name_or_path, where model.adapter names a base


class Recipe(Section):
    """The complete description of one run; frozen. Made by `load_recipe`."""

    model: Model
    quantization: Quantization | None  # null: the base stays in 16 bits or float32
    lora: Lora | None  # null: every weight is trained, or the settings are those of model.adapter
    neftune: Neftune | None = None
    data: Data
    train: Train
    machine: Machine = Field(default_factory=Machine)

    @model_validator(mode="before")
    @classmethod
    def _taken_from_the_adapter(cls, values: Any) -> Any:
        """Let base and LoRA settings be left out where ``model.adapter`` has them, see `adapter.continued`."""
        model = values.get("model") if isinstance(values, dict) else None
        if not isinstance(model, dict) or not model.get("adapter"):
            return values
        return {"lora": None, **values, "model": {"name_or_path": OF_THE_ADAPTER, **model}}

    @field_validator("lora")
    @classmethod
    def _something_is_trained(cls, value: Lora | None, info: ValidationInfo) -> Lora | None:
        known = "model" in info.data and "quantization" in info.data
        if value is None and known and info.data["model"].adapter is None and info.data["quantization"] is not None:
            raise broken_rule(
                "null trains every weight, which no weight in NF4 allows, and there is a quantization section. Write "
                "quantization: null too, to train the full model; or a lora section "
                f"({', '.join(Lora.model_fields)}), to train an adapter; or model.adapter, to go on from one.",
                involves=("quantization.", "model.adapter"),
            )
        return value

    @property
    def trains_all(self) -> bool:
        """Whether every weight of the model is trained, without an adapter."""
        return self.lora is None and self.model.adapter is None

    @property
    def adapter(self) -> Lora:
        """The adapter's settings, once they are known: a recipe with ``model.adapter`` may leave them to it."""
        if self.trains_all:
            raise ValueError("lora: is null, every weight is trained. Ask trains_all first.")
        if self.lora is None:
            raise ValueError("lora: is not known before the adapter is read. Use adapter.continued.resolved.")
        return self.lora

    @field_validator("train")
    @classmethod
    def _selection_needs_held_out_rows(cls, value: Train, info: ValidationInfo) -> Train:
        data = info.data.get("data")
        if value.selects and data is not None and not data.has_eval_rows:
            best = value.keep == "best"
            key, got = ("keep", "best") if best else ("early_stopping_patience", value.early_stopping_patience)
            raise broken_rule(
                f"goes by the loss on held-out rows, and there are none, got {got}. Give data.eval_path, "
                "data.eval_split or data.eval_fraction, or remove it.",
                key=key,
                involves=("data.eval_path", "data.eval_split", "data.eval_fraction"),
            )
        return value

    @field_validator("train")
    @classmethod
    def _loraplus_needs_lora(cls, value: Train, info: ValidationInfo) -> Train:
        model, ratio = info.data.get("model"), value.loraplus_lr_ratio
        in_full = info.data.get("lora", ...) is None and model is not None and model.adapter is None
        if ratio is not None and in_full:
            raise broken_rule(
                f"has no effect without LoRA, got {ratio:g}. Remove it.", key="loraplus_lr_ratio", involves=("lora.",)
            )
        return value

    # On ``machine``, the last section: all others are in ``info.data``.
    @field_validator("machine")
    @classmethod
    def _belongs_to_what_is_trained(cls, value: Machine, info: ValidationInfo) -> Machine:
        quantization, lora, model = (info.data.get(name, ...) for name in ("quantization", "lora", "model"))
        if quantization is None and value.bnb_4bit_quant_storage != "auto":
            raise broken_rule(
                f"has no effect on a base that is not quantized, got {value.bnb_4bit_quant_storage}. Remove it.",
                key="bnb_4bit_quant_storage",
                involves=("quantization.",),
            )
        if lora is not None or not isinstance(model, Model) or model.adapter is not None:
            return value
        if value.fused_lora is True:
            raise broken_rule("has no effect without LoRA, got true. Remove it.", key="fused_lora", involves=("lora.",))
        if value.push_to is not None:
            raise broken_rule(
                f"checkpoints of adapters alone are pushed, and lora is null, got {value.push_to!r}. Remove it.",
                key="push_to",
                involves=("lora.",),
            )
        return value

    @field_validator("machine")
    @classmethod
    def _evaluation_needs_held_out_rows(cls, value: Machine, info: ValidationInfo) -> Machine:
        data = info.data.get("data")
        for key in ("eval_steps", "per_device_eval_batch_size", "eval_answers"):
            # 0 asks for nothing, and nothing is what it gets.
            if data is not None and not data.has_eval_rows and getattr(value, key) not in ("auto", 0):
                raise broken_rule(
                    f"has no effect without held-out rows, got {getattr(value, key)}. "
                    "Remove it, or give data.eval_path, data.eval_split or data.eval_fraction.",
                    key=key,
                    involves=("data.eval_path", "data.eval_split", "data.eval_fraction"),
                )
        return value

    @field_validator("machine")
    @classmethod
    def _streaming_needs_data_from_the_hub(cls, value: Machine, info: ValidationInfo) -> Machine:
        data = info.data.get("data")
        if value.streaming and data is not None and not any(is_data_on_the_hub(path) for path in data.paths):
            raise broken_rule(
                f"has an effect only on data from the Hub, and data.path is {data.path!r}, got true. Remove it.",
                key="streaming",
                involves=("data.path",),
            )
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return the complete recipe as plain values, ready for JSON or YAML."""
        # Without warnings: a recorded recipe may lack a required key, see `recipe_of_record`.
        return self.model_dump(mode="json", warnings=False)

    def flat(self) -> dict[str, Any]:
        """Return every key as ``section.key`` to value; an absent section has none."""
        return flat(self.to_dict())

    def learned(self) -> dict[str, Any]:
        """Return what decides the trained weights as ``section.key`` to value: two runs equal in it learn the same."""
        return learned(self.to_dict())

    def to_yaml(self) -> str:
        """Return the complete recipe as YAML, which loads as an equal recipe."""
        from .yaml_text import dump_yaml

        return dump_yaml(self.to_dict())
