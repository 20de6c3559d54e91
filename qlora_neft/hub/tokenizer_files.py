"""The tokenizer that is published with an adapter, without a path of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..data.templates import read_jinja
from ..files.suffixes import JINJA_SUFFIXES
from ..trained import AdapterFolder
from ..trained.tokenizer import tokenizer_of_adapter

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
PATH_KEYS = ("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file")


def write_tokenizer(folder: AdapterFolder, target: Path) -> bool:
    """Write the tokenizer that the adapter was trained with; of a checkpoint it is the base's.

    Returns:
        False if none lies beside the adapter and nothing is known of its training: readers then take the base's.
    """
    if (folder.path / "tokenizer_config.json").is_file():
        for name in FILES:
            if (folder.path / name).is_file():
                shutil.copyfile(folder.path / name, target / name)
    elif folder.recipe is not None:
        tokenizer = tokenizer_of_adapter(folder)
        stated = folder.recipe["data"].get("prompt_template", "auto")
        if stated.endswith(JINJA_SUFFIXES):
            tokenizer.chat_template = read_jinja(stated)
        tokenizer.save_pretrained(target)
    else:
        return False
    _drop_paths(target / "tokenizer_config.json")
    return True


def _drop_paths(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in PATH_KEYS}
    if kept != config:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
