"""What decides how text becomes tokens, in parts that can be named: a resume compares them, and the cache is keyed by
them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..files import sha256_of_text
from ..paths import JINJA_SUFFIXES
from .templates import read_jinja

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREPARATION = 6  # of this package's own preparation; raise it when the same rows would give other sequences
# Another version of these may cut the same text into other tokens, or render it otherwise.
CUTTERS = ("tokenizers", "transformers", "jinja2")
_NAMES = {"model": "vocabulary", "added_tokens": "added tokens"}


def versions() -> dict[str, str]:
    """Return the versions of all that turns rows into tokens."""
    return {"preparation": str(PREPARATION), **{name: version(name) for name in CUTTERS}}


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the SHA-256 of each part of a tokenizer that decides its output: vocabulary, normalizer, ..."""
    if tokenizer.is_fast:
        found = json.loads(tokenizer.backend_tokenizer.to_str())
        # State, not settings: what the tokenizer was last asked to pad or cut.
        for name in ("padding", "truncation", "version"):
            found.pop(name, None)
    else:
        vocabulary = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
        found = {"vocabulary": vocabulary, "settings": str(tokenizer.init_kwargs)}
    return {_NAMES.get(name, name): _sha256(part) for name, part in found.items()}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the named special tokens of a tokenizer, except that for padding, which is masked."""
    found = tokenizer.special_tokens_map.items()
    return {name: str(token) for name, token in found if name != "pad_token"}


def templates(tokenizer: PreTrainedTokenizerBase, named: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of the chat templates that are read from files.

    Args:
        tokenizer: For the template ``chat``, which is its own.
        named: Templates as the recipe names them; those that are part of this package are left out.

    Returns:
        By ``chat``, ``file``, ``file 2``, ...: a file is known by its content, wherever it lies.
    """
    found: dict[str, str] = {}
    for name in dict.fromkeys(named):
        if name == "chat":
            found[name] = _sha256(tokenizer.chat_template)
        elif name.endswith(JINJA_SUFFIXES):
            count = sum(known.startswith("file") for known in found)
            found["file" if not count else f"file {count + 1}"] = sha256_of_text(read_jinja(name))
    return found


def fingerprint(parts: dict[str, Any]) -> str:
    """Return the SHA-256 of plain values and of the versions of what prepares them, as hex."""
    return sha256_of_text(json.dumps({"versions": versions(), **parts}, sort_keys=True, default=str))


def _sha256(part: Any) -> str:
    return sha256_of_text(json.dumps(part, sort_keys=True, default=str))
