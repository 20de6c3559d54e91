"""Nothing of this machine and no token leaves it: the last look at a folder before it is published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import RunFailed, UserInputError
from ..trained.folder import WEIGHTS

TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
OURS = ("README.md", "adapter_config.json", "recipe.yaml", "training_summary.json")  # a vocabulary may hold "/home"


def refuse_secrets(folder: Path, local_paths: Iterable[str]) -> None:
    """Look for tokens in every file but the weights, and for paths in the files that are written here.

    Args:
        folder: About to be published.
        local_paths: Absolute paths that must not stand in it.

    Raises:
        UserInputError: If there is a token, with the file's name; the token is not repeated.
        RunFailed: If there is a path.
    """
    tokens = [token.encode() for token in _own_tokens()]
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == WEIGHTS:
            continue
        content = path.read_bytes()
        if TOKEN.search(content) or any(token in content for token in tokens):
            raise UserInputError(
                f"{path.name}: holds an access token of the Hub, which must not be published. Remove it from the file "
                "it came from, and revoke it on the Hub."
            )
        found = [local for local in local_paths if path.name in OURS and _names(content, local)]
        if found:
            raise RunFailed(
                f"{path.name} would publish the path {found[0]!r}; nothing was written. Please report this."
            )


def _names(content: bytes, path: str) -> bool:
    """Whether a path stands in a text: ``/data`` does not in ``huggingface.co/datasets``."""
    return re.search(rb"(?<![\w.])" + re.escape(path.encode()) + rb"(?![\w-])", content) is not None


def _own_tokens() -> list[str]:
    from huggingface_hub import get_token

    found = [os.environ.get(name, "").strip() for name in TOKEN_VARIABLES]
    return [token for token in [*found, get_token() or ""] if len(token) >= 8]
