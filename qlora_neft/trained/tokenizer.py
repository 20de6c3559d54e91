"""The tokenizer of an adapter; no weight is read and PEFT is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserInputError
from ..tokenizer import load_tokenizer
from .folder import AdapterFolder


def tokenizer_of_adapter(folder: AdapterFolder) -> Any:
    """The tokenizer saved beside the adapter, else the base's."""
    if (folder.path / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder.path))
    with naming_the_base(folder):
        return load_tokenizer(folder.base, revision=folder.base_revision)


@contextmanager
def naming_the_base(folder: AdapterFolder) -> Iterator[None]:
    """What is wrong with a base, in the words of who loads an adapter: ``model.name_or_path`` is a recipe's.

    Raises:
        UserInputError: With ``--base``, or with the adapter whose base it is and how to give another.
    """
    try:
        yield
    except UserInputError as error:
        rule = str(error).removeprefix("model.name_or_path: ")
        if folder.own_base:
            raise UserInputError(f"--base: {rule}") from error
        raise UserInputError(f"{folder.source}: its base: {rule} Another place of the base: --base.") from error
