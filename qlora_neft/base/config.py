"""Whether a base can be trained, by its configuration: no weight is read and bitsandbytes is not imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import UserInputError, first_line

# Said outright at every load: without it transformers asks at a terminal, and a "y" runs the code.
NOT_RUN = {"trust_remote_code": False}


def refuse_remote_code(name_or_path: str, error: Exception) -> None:
    """If what transformers refused is to run a repository's own code, say so; else nothing.

    Args:
        name_or_path: Hub id or directory.
        error: What ``from_pretrained`` raised. It names its argument ``trust_remote_code`` in this case alone.

    Raises:
        UserInputError: If the model, or its tokenizer, needs code of its own.
    """
    if "trust_remote_code" in str(error):
        raise needs_its_own_code(name_or_path) from error


def needs_its_own_code(name_or_path: str) -> UserInputError:
    """The refusal of a model that transformers has no code for."""
    return UserInputError(
        f"model.name_or_path: {name_or_path!r} needs Python code from its own repository (auto_map in its "
        "configuration), and such code is not run. Choose a model that transformers has built in; or, if you have "
        "read that code and trust it, use QLoRANeftTrainer from Python with QLoRANeftConfig(trust_remote_code=True)."
    )


def check_base_config(name_or_path: str, **kwargs: Any) -> Any:
    """Read the base's configuration and refuse what cannot be trained, before any weight is read.

    Args:
        name_or_path: Hub id or directory.
        kwargs: Passed on to ``AutoConfig.from_pretrained`` (``revision``; ``trust_remote_code``, default False).

    Returns:
        The model's configuration.

    Raises:
        UserInputError: If there is none, it is no causal language model, it needs code of its own repository, or it is
            quantized other than in NF4.
    """
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).expanduser().is_dir():
        raise UserInputError(f"model.name_or_path: no folder at {name_or_path!r}. Give a folder or a Hub id.")
    refusal = (
        f"model.name_or_path: no model configuration found at {name_or_path!r}. Give a Hub id you can reach or a "
        "directory with a config.json."
    )
    config = read_config(name_or_path, refusal, **kwargs)
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = config.architectures or []
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if remote and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not kwargs.get("trust_remote_code"):
        raise needs_its_own_code(name_or_path)
    mapped = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or remote
    if not mapped or config.is_encoder_decoder or (architectures and not remote and not causal & set(architectures)):
        raise UserInputError(
            f"model.name_or_path: must be a causal language model, {name_or_path!r} is "
            f"{', '.join(architectures) or config.model_type}. Choose a decoder such as Llama, Mistral, Qwen or Gemma."
        )
    _check_stored_quantization(name_or_path, getattr(config, "quantization_config", None))
    return config


def check_context(config: Any, max_length: int) -> None:
    """Refuse rows longer, in tokens, than the base was made for.

    Raises:
        UserInputError: If ``max_length`` exceeds ``max_position_embeddings``.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise UserInputError(
            f"data.max_length: the model's context is {context} tokens, got {max_length}. Write {context} or less."
        )


def check_vocabulary(config: Any, largest_token_id: int) -> None:
    """Refuse token ids beyond the embedding, which would end in an index error, on a GPU a cryptic one.

    Raises:
        UserInputError: If ``largest_token_id`` is no row of the embedding.
    """
    size = config.get_text_config().vocab_size
    if largest_token_id >= size:
        raise UserInputError(
            f"model.name_or_path: the tokenizer makes token id {largest_token_id}, the model's vocabulary has {size}. "
            "Use the tokenizer that the model was trained with."
        )


def read_config(name_or_path: str, refusal: str, **kwargs: Any) -> Any:
    """transformers' configuration of a model.

    Args:
        name_or_path: Hub id or directory.
        refusal: What the caller's user is told if there is none; transformers' reason is added.
        kwargs: Passed on to ``AutoConfig.from_pretrained``.

    Raises:
        UserInputError: If there is none, or it needs code of its own repository.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path, **{**NOT_RUN, **kwargs})
    except (OSError, ValueError) as error:
        refuse_remote_code(name_or_path, error)
        raise UserInputError(f"{refusal} ({first_line(error)})") from error


def _check_stored_quantization(name_or_path: str, stored: Any) -> None:
    if stored is None:
        return
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(stored.get("quant_method", "unknown"))
    kind = stored.get("bnb_4bit_quant_type", "fp4")  # what bitsandbytes takes an unsaid type for
    if "bitsandbytes" in method.lower() and stored.get("load_in_4bit") and kind == "nf4":
        return
    detail = f"{method} {kind}" if stored.get("load_in_4bit") else method
    raise UserInputError(
        f"model.name_or_path: the base must be unquantized or stored in bitsandbytes NF4, {name_or_path!r} is "
        f"quantized with {detail}. Start from the original 16-bit checkpoint."
    )


def load_tokenizer(name_or_path: str, **kwargs: Any) -> Any:
    """Load a model's tokenizer; one without a pad token pads with its end token.

    Args:
        name_or_path: Hub id or directory.
        kwargs: Passed on to ``AutoTokenizer.from_pretrained`` (``revision``; ``trust_remote_code``, default
            False).

    Raises:
        UserInputError: If there is none, it needs code of its own repository, or it has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **{**NOT_RUN, **kwargs})
    except (OSError, ValueError) as error:
        refuse_remote_code(name_or_path, error)
        raise UserInputError(
            f"model.name_or_path: no tokenizer could be read from {name_or_path!r}. ({first_line(error)})"
        ) from error
    if tokenizer.eos_token is None:
        raise UserInputError(
            f"model.name_or_path: the tokenizer of {name_or_path!r} has no end token, so the model would never learn "
            "to stop. Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
