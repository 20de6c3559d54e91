"""Configuration and tokenizer of a base, and whether it can be trained. Reads no weight, imports no bitsandbytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..errors import UserInputError, first_line
from ..paths import kind_of
from .model_files import adapter_base
from .text_part import CausalModel, causal_model

# Passed explicitly to every load: without it transformers asks at a terminal, and a "y" runs the code.
NOT_RUN = {"trust_remote_code": False}
ENCODERS = frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES)  # model types made to fill in masked tokens
_CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def check_base_config(name_or_path: str, **kwargs: Any) -> PreTrainedConfig:
    """Read the base's configuration and refuse what cannot be trained, before any weight is read.

    Args:
        name_or_path: Hub id or directory.
        kwargs: Passed on to ``AutoConfig.from_pretrained`` (``revision``; ``trust_remote_code``, default False).

    Returns:
        The model's configuration.

    Raises:
        UserInputError: If there is none, it is not a causal language model, it needs code from its own repository, or
            it is quantized other than in NF4.
    """
    if kind_of(name_or_path) == "local" and not Path(name_or_path).expanduser().is_dir():
        raise UserInputError(f"model.name_or_path: no folder at {name_or_path!r}. Give a folder or a Hub id.")
    if (base := adapter_base(name_or_path, kwargs.get("revision"))) is not None:
        raise UserInputError(
            f"model.name_or_path: {name_or_path!r} is an adapter{f' of {base}' if base else ''}, not a model. To go on "
            f"training from it, write model.adapter: {name_or_path} in its place; to train its base anew, "
            f"model.name_or_path: {base or 'the base'}."
        )
    refusal = (
        f"model.name_or_path: no model configuration found at {name_or_path!r}. Give a Hub id you can reach or a "
        "directory with a config.json."
    )
    config = read_config(name_or_path, refusal, **kwargs)
    causal = causal_model(config)
    brings_its_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    # A repository may bring code for a model that transformers has too; then its code is not needed.
    if brings_its_code and causal is None and not kwargs.get("trust_remote_code"):
        raise _needs_its_own_code(name_or_path)
    if not brings_its_code and (why := _why_not_causal(config, causal)):
        raise UserInputError(
            f"model.name_or_path: must be a causal language model, {name_or_path!r} is {why}. Choose a decoder such as "
            "Llama, Mistral, Qwen or Gemma."
        )
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        _check_stored_quantization(name_or_path, getattr(part, "quantization_config", None))
    return config


def check_context(config: PreTrainedConfig, max_length: int) -> None:
    """Refuse rows longer, in tokens, than the base was made for.

    Raises:
        UserInputError: If ``max_length`` exceeds ``max_position_embeddings``.
    """
    # get_text_config: of a multimodal model the part that reads tokens.
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    # -1 is no limit: xlnet's positions are relative.
    if context is not None and 0 < context < max_length:
        raise UserInputError(
            f"data.max_length: the model's context is {context} tokens, got {max_length}. Write {context} or less."
        )


def check_vocabulary(config: PreTrainedConfig, largest_token_id: int) -> None:
    """Refuse token ids beyond the embedding, which would end in an index error, on a GPU in a cryptic one.

    Raises:
        UserInputError: If the embedding has no row ``largest_token_id``.
    """
    size = config.get_text_config().vocab_size
    if largest_token_id >= size:
        raise UserInputError(
            f"model.name_or_path: the tokenizer makes token id {largest_token_id}, the model's vocabulary has {size}. "
            "Use the tokenizer that the model was trained with."
        )


def read_config(name_or_path: str, refusal: str, **kwargs: Any) -> PreTrainedConfig:
    """Read a model's configuration through transformers.

    Args:
        name_or_path: Hub id or directory.
        refusal: Error message if there is none; transformers' reason is added.
        kwargs: Passed on to ``AutoConfig.from_pretrained``.

    Raises:
        UserInputError: If there is none, or it needs code from its own repository.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path, **{**NOT_RUN, **kwargs})
    except (OSError, ValueError) as error:
        _refuse_remote_code(name_or_path, error)
        raise UserInputError(f"{refusal} ({first_line(error)})") from error


def stored_config(name_or_path: str, config: PreTrainedConfig, *, revision: str | None = None) -> dict[str, Any]:
    """Return the content of a base's ``config.json`` as it is stored, without what transformers would add to it.

    Args:
        name_or_path: Hub id or directory.
        config: The configuration that was read from there.
        revision: Hub branch, tag or commit.
    """
    # By its commit, a file of the Hub is found in the download cache, and is the one that was read.
    commit = getattr(config, "_commit_hash", None) or revision
    stored, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=commit)
    return {key: _as_stored(value) for key, value in stored.items() if key != "_commit_hash"}


def _as_stored(value: Any) -> Any:
    """Spell infinity (Mamba's limit of time steps) and NaN as transformers stores them: JSON has no words for them."""
    if isinstance(value, dict):
        return {key: _as_stored(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_stored(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": json.dumps(value)}
    return value


def load_tokenizer(name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; one without a pad token pads with its end token.

    Args:
        name_or_path: Hub id or directory.
        kwargs: Passed on to ``AutoTokenizer.from_pretrained`` (``revision``; ``trust_remote_code``, default False).

    Raises:
        UserInputError: If there is none, it needs code from its own repository, or it has no end token.
    """
    try:
        # Upstream's annotation allows None, which only its own fallbacks see.
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(name_or_path, **{**NOT_RUN, **kwargs}))
    except (OSError, ValueError) as error:
        _refuse_remote_code(name_or_path, error)
        raise UserInputError(
            f"model.name_or_path: no tokenizer could be read from {name_or_path!r}. ({first_line(error)})"
        ) from error
    if tokenizer.eos_token is None:
        raise UserInputError(
            f"model.name_or_path: the tokenizer of {name_or_path!r} has no end token, so the model would never learn "
            "to stop. Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token is None:
        # Padding is masked, so its token does not matter; `check_labels` refuses collators that mask real end tokens.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _why_not_causal(config: PreTrainedConfig, causal: CausalModel | None) -> str:
    """Say what a configuration is, if it is not that of a causal language model; nothing if it is."""
    named = ", ".join(config.architectures or []) or config.model_type
    if config.is_encoder_decoder or causal is None:
        return named
    # Encoders can be built with a causal head, but without this flag every token sees those after it.
    if getattr(causal.config, "is_decoder", True) is False and causal.config.model_type in ENCODERS:
        return f"{named}, an encoder (is_decoder is false in its configuration)"
    # A configuration class may serve several heads: if the checkpoint names one, it must be a causal one. A text part's
    # checkpoint is named after the whole, whose name says nothing but that it is no classifier.
    if causal.is_text_part:
        return named if "Classification" in named else ""
    return "" if not config.architectures or _CAUSAL & set(config.architectures) else named


def _refuse_remote_code(name_or_path: str, error: Exception) -> None:
    # In the one case of code that it may not run, transformers' message names its argument.
    if "trust_remote_code" in str(error):
        raise _needs_its_own_code(name_or_path) from error


def _needs_its_own_code(name_or_path: str) -> UserInputError:
    return UserInputError(
        f"model.name_or_path: {name_or_path!r} needs Python code from its own repository (auto_map in its "
        "configuration), and such code is not run. Choose a model that transformers has built in; or, if you have "
        "read that code and trust it, use QLoRANeftTrainer from Python with QLoRANeftConfig(trust_remote_code=True)."
    )


def _check_stored_quantization(name_or_path: str, stored: Any) -> None:
    if stored is None:
        return
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(stored.get("quant_method", "unknown"))
    kind = stored.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    if "bitsandbytes" in method.lower() and stored.get("load_in_4bit") and kind == "nf4":
        return
    detail = f"{method} {kind}" if stored.get("load_in_4bit") else method
    raise UserInputError(
        f"model.name_or_path: the base must be unquantized or stored in bitsandbytes NF4, {name_or_path!r} is "
        f"quantized with {detail}. Start from the original 16-bit checkpoint."
    )
