"""The keys a recipe may have, read from the schema: as a table, and to guess what an unknown one meant."""

from __future__ import annotations

import difflib
import json
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from .schema import Recipe, Section

# Names that other trainers use for our keys. One with a section is a synonym in that section only.
_SYNONYMS = {
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "dropout": "lora.lora_dropout",
    "lora.alpha": "lora.lora_alpha",
    "rslora": "lora.use_rslora",
    "lora_use_rslora": "lora.use_rslora",
    "peft_use_rslora": "lora.use_rslora",
    "loraplus": "train.loraplus_lr_ratio",
    "loraplus_ratio": "train.loraplus_lr_ratio",
    "neftune.alpha": "neftune.noise_alpha",
    "alpha": "neftune.noise_alpha",
    "neftune_alpha": "neftune.noise_alpha",
    "neftune_noise_alpha": "neftune.noise_alpha",
    "machine.batch_size": "machine.per_device_train_batch_size",
    "micro_batch_size": "machine.per_device_train_batch_size",
    "batch_size": "train.effective_batch_size",
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "optimizer": "train.optim",
    "lr_scheduler": "train.lr_scheduler_type",
    "scheduler": "train.lr_scheduler_type",
    "warmup_ratio": "train.warmup_steps",
    "column_mapping": "data.columns",
    "field_messages": "data.columns",
    "system": "data.system_prompt",
    "default_system": "data.system_prompt",
    "default_system_message": "data.system_prompt",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "template": "data.prompt_template",
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "base_model": "model.name_or_path",
    "gradient_checkpointing": "machine.activation_checkpointing",
    "bf16": "machine.precision",
    "fp16": "machine.precision",
}
# gradient_accumulation_steps has no counterpart here, so it gets an explanation in place of a synonym.
_ACCUMULATION = (
    "train.effective_batch_size sets the sequences of a step, machine.per_device_train_batch_size how many of them at "
    "most go through one forward pass; the number of passes follows."
)


@dataclass(frozen=True)
class Key:
    """One key of a recipe, as tables show it.

    Attributes:
        name: ``section.key``.
        type, default: In words.
        about: What it means.
    """

    name: str
    type: str
    default: str
    about: str


def section_names() -> list[str]:
    """Return the names of the sections, in order."""
    return list(Recipe.model_fields)


def section_class(section: str) -> type[Section]:
    """Return the model of a section, which may be optional in the recipe."""
    annotation = Recipe.model_fields[section].annotation
    # ``Neftune | None`` has arguments; the other sections have none.
    kinds = (*get_args(annotation), annotation)
    return next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))


def fields_of(section: str) -> dict[str, FieldInfo]:
    """Return the keys of a section, in order, as pydantic holds them."""
    return section_class(section).model_fields


def item_fields(section: str, key: str) -> dict[str, FieldInfo]:
    """Return the keys of the mappings in a list, for a key that holds such a list."""
    [item] = get_args(fields_of(section)[key].annotation)
    return item.model_fields


def key_names() -> list[str]:
    """Return every key as ``section.key``, in order."""
    return [f"{section}.{key}" for section in section_names() for key in fields_of(section)]


def is_mapping(name: str) -> bool:
    """Return whether a key, as ``section.key``, holds a mapping of names that the user chooses."""
    section, _, key = name.partition(".")
    return name in key_names() and get_origin(fields_of(section)[key].annotation) is dict


def key_table() -> list[Key]:
    """Return every key with its type, default and meaning, in order."""
    return [
        Key(f"{section}.{name}", describe_type(field), _default(field), field.description or "")
        for section in section_names()
        for name, field in fields_of(section).items()
    ]


def describe_type(field: FieldInfo) -> str:
    """Return what a key may hold in words, such as ``auto or whole number >= 1``."""
    return _words(field.annotation, field.metadata)


def unknown_key(name: str) -> str:
    """Return the message for a key or a section that does not exist, with what may have been meant."""
    # Whatever section it was written in.
    last = name.rsplit(".", 1)[-1]
    if last == "gradient_accumulation_steps":
        return f"unknown key: {_ACCUMULATION}"
    kind = "key" if "." in name else "section"
    meant = _meant(name)
    hint = f" Did you mean {meant}?" if meant else ""
    return f"unknown {kind}.{hint} All keys: qlora-neft show --keys"


def _meant(name: str) -> str | None:
    section, _, last = name.rpartition(".")
    # The surest guess first: another trainer's name, our key in another section, a misspelling.
    if name in _SYNONYMS or last in _SYNONYMS:
        return _SYNONYMS.get(name) or _SYNONYMS[last]
    elsewhere = [key for key in key_names() if key.rsplit(".", 1)[1] == last]
    if elsewhere:
        return elsewhere[0]
    # The section that was written is more likely meant than any other.
    near = [f"{section}.{key}" for key in fields_of(section)] if section in section_names() else section_names()
    for candidates in (near, key_names()):
        short = {key.rsplit(".", 1)[-1]: key for key in candidates}
        close = difflib.get_close_matches(last, short, n=1)
        if close:
            return short[close[0]]
    return None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return json.dumps(field.default).strip('"')  # true, null, 0.999: as in YAML


def _words(annotation: Any, metadata: typing.Iterable[Any] = ()) -> str:
    """Return a type in words, with its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [bound for extra in arguments[1:] for bound in _bounds(extra)])
    if origin is Literal:
        return " or ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        # A whole number is a number: "whole number >= 1 or number > 0" says no more than its second half.
        words = [_words(kind) for kind in arguments]
        numbers = [word for word in words if word.startswith("number")]
        return " or ".join(word for word in words if not (numbers and word.startswith("whole")))
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of text to {_words(arguments[1])}"
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"mapping ({', '.join(annotation.model_fields)})"
    word = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}[annotation]
    return " ".join([word, " and ".join(_bound(bound) for bound in metadata if _bound(bound))]).strip()


def _bounds(extra: Any) -> list[Any]:
    return extra.metadata if isinstance(extra, FieldInfo) else [extra]


def _bound(bound: Any) -> str:
    match bound:
        case Ge():
            return f">= {bound.ge}"
        case Gt():
            return f"> {bound.gt}"
        case Le():
            return f"<= {bound.le}"
        case Lt():
            return f"< {bound.lt}"
    return ""
