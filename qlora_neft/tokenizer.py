"""Loading a tokenizer that a model can be taught to stop with."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from .errors import UserInputError
from .remote_code import NOT_RUN, refuse_remote_code


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
        first_line = str(error).strip().splitlines()[0]
        raise UserInputError(
            f"model.name_or_path: no tokenizer could be read from {name_or_path!r}. ({first_line})"
        ) from error
    if tokenizer.eos_token is None:
        raise UserInputError(
            f"model.name_or_path: the tokenizer of {name_or_path!r} has no end token, so the model would never learn "
            "to stop. Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
