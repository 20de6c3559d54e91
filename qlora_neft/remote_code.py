"""Python code that a model's repository brings: not run unless the caller says so, and then named."""

from __future__ import annotations

from .errors import UserInputError

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
