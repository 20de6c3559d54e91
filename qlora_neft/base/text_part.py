"""The causal language model in a checkpoint: the whole of it, or the text part of one that also sees or hears.

The model type decides, not the ``architectures`` that a checkpoint names: a vision-language checkpoint holds a language
model under names of its own, which is loaded alone. Its towers are not loaded, so neither adapted nor trained.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where checkpoints keep their language model: transformers 4 saved "language_model.model.layers", 5 has
# "model.language_model.layers" in memory and writes either, by family. Later patterns see what earlier ones made.
KEYS_OF_TEXT_PART = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^model\.text_model\.": "model.",
}


@dataclass(frozen=True)
class CausalModel:
    """What of a checkpoint is loaded, and how.

    Attributes:
        model_class: Class whose ``from_pretrained`` loads it.
        config: Configuration of that class; of a text part, the one nested in the checkpoint's.
        key_mapping: Renamings from stored names to the model's, as ``from_pretrained`` takes them; empty for a whole
            checkpoint.
        without: Parts of the checkpoint that are left out, such as ``vision_config``.
    """

    model_class: Any
    config: PreTrainedConfig
    key_mapping: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    @property
    def is_text_part(self) -> bool:
        """Whether the checkpoint holds more than this model."""
        return bool(self.key_mapping)

    def load_kwargs(self) -> dict[str, Any]:
        """Return what ``from_pretrained`` must be told; nothing for a whole checkpoint."""
        return {"config": self.config, "key_mapping": dict(self.key_mapping)} if self.is_text_part else {}

    def build(self, **kwargs: Any) -> PreTrainedModel:
        """Build the model without reading weights, under whatever device context is open."""
        if self.is_text_part:
            return self.model_class._from_config(copy.deepcopy(self.config), **kwargs)
        return AutoModelForCausalLM.from_config(copy.deepcopy(self.config), **kwargs)

    def renamed(self, key: str) -> str:
        """Return a stored name as the model's, as far as `key_mapping` goes."""
        for pattern, name in self.key_mapping.items():
            key = re.sub(pattern, name, key)
        return key


def causal_model(config: PreTrainedConfig) -> CausalModel | None:
    """Return the causal language model of a configuration; None if transformers has none for it.

    Models that bring their own code are not looked at here.
    """
    own = _class_of(config)
    text = _text_config(config)
    if text is not None and (own is None or _is_whole_and_more(own, config)):
        text_class = _class_of(text)
        if text_class is not None and text_class.config_class is type(text) and not text.is_encoder_decoder:
            return CausalModel(text_class, _as_text_part(config, text), KEYS_OF_TEXT_PART, _others(config))
    return None if own is None else CausalModel(AutoModelForCausalLM, config)


def _class_of(config: PreTrainedConfig) -> Any:
    """Return the class that transformers has for causal language modeling with a configuration, None without one."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def _is_whole_and_more(own: Any, config: PreTrainedConfig) -> bool:
    """Whether the mapping leads to a class with towers, or to the text part's own class."""
    return own.__name__.endswith("ForConditionalGeneration") or own.config_class is not type(config)


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    text = getattr(config, "text_config", None) if "text_config" in config.sub_configs else None
    return text if isinstance(text, PreTrainedConfig) else None


def _others(config: PreTrainedConfig) -> tuple[str, ...]:
    return tuple(sorted(name for name in config.sub_configs if name != "text_config" and hasattr(config, name)))


def _as_text_part(config: PreTrainedConfig, text: PreTrainedConfig) -> PreTrainedConfig:
    """Return the text part's configuration with what only the whole one says: where it is from, how it is stored."""
    text = copy.deepcopy(text)
    text._name_or_path = config._name_or_path  # PEFT names the base by it
    text._commit_hash = getattr(config, "_commit_hash", None)
    if getattr(text, "dtype", None) is None:
        text.dtype = getattr(config, "dtype", None)
    stored = getattr(config, "quantization_config", None)
    if stored is not None and getattr(text, "quantization_config", None) is None:
        text.quantization_config = _renamed_skips(stored)
    # Whole models tie by their own flag, text parts by theirs. Where one of them says so and the files hold a head of
    # its own, transformers leaves it untied.
    tied = [bool(getattr(one, "tie_word_embeddings", False)) for one in (config, text)]
    text.tie_word_embeddings = any(tied)
    return text


def _renamed_skips(stored: Any) -> Any:
    """Rename the modules that were not quantized: the whole model's names are not those of its text part."""
    entry = dict(stored) if isinstance(stored, dict) else stored.to_dict()
    skipped = entry.get("llm_int8_skip_modules")
    if skipped:
        entry["llm_int8_skip_modules"] = [_renamed_module(name) for name in skipped]
    return entry


def _renamed_module(name: str) -> str:
    key = f"{name}."
    for pattern, renamed in KEYS_OF_TEXT_PART.items():
        key = re.sub(pattern, renamed, key)
    return key.removesuffix(".")
