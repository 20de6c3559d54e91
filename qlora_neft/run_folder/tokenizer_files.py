"""The files of a tokenizer beside what was trained: the base's own, byte for byte, the chat template laid over.

transformers 5 writes a tokenizer in a form of its own (``TokenizersBackend``, ``extra_special_tokens`` as a list) that
transformers 4 cannot load, nor vLLM, TGI and converters pinned to it
(https://github.com/huggingface/transformers/issues/47553). Can go when nobody needs version 4.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import leads_out, read_json, read_record_if_there

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
# Every file that a tokenizer of transformers may be read from; a class may name more (``vocab_files_names``).
FILES = (
    "tokenizer.json",
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    TEMPLATE,
)
# Classes that only transformers 5 knows.
NEW_CLASSES = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend", "MistralCommonBackend")


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    say: Callable[[str], None] | None = None,
) -> bool:
    """Write a tokenizer: the files it was loaded from if they give the same tokens, and its chat template.

    Args:
        tokenizer: Of a folder or Hub id (``name_or_path``), or made in memory. A processor is written by its own rules.
        output_dir: An existing folder.
        revision: Hub branch, tag or commit it was loaded from.
        say: Called with a line if the files are not the base's own.

    Returns:
        Whether they are.
    """
    output_dir = Path(output_dir)
    why_not = _copy(tokenizer, output_dir, revision)
    if why_not is None:
        return True
    tokenizer.save_pretrained(output_dir)
    if say is not None:
        say(f"tokenizer: {why_not}, so its files are those that transformers writes, not the base's own")
    return False


def needs_transformers_5(folder: Path) -> str | None:
    """Return what in a tokenizer's configuration transformers 4 cannot load, None if nothing is known."""
    config = read_record_if_there(folder / CONFIG, "Copy or download it again.") or {}
    if config.get("tokenizer_class") in NEW_CLASSES:
        return f"tokenizer_class {config['tokenizer_class']}"
    if isinstance(config.get("extra_special_tokens"), list):
        return "extra_special_tokens as a list"
    return None


def _copy(tokenizer: PreTrainedTokenizerBase, output_dir: Path, revision: str | None) -> str | None:
    """Copy a tokenizer's own files; return why that cannot be done, None if it is done."""
    source = getattr(tokenizer, "name_or_path", "")
    names = dict.fromkeys([*FILES, *getattr(tokenizer, "vocab_files_names", {}).values()])
    found = {name: path for name in names if (path := _find(source, name, revision)) is not None} if source else {}
    if CONFIG not in found:
        return "the files it was loaded from are not here"
    folder = Path(source).expanduser()
    if folder.is_dir() and (links := [name for name, path in found.items() if leads_out(path, folder)]):
        return f"{links[0]} is a link that leads out of the base's folder"
    stored = _load(source, revision)
    if stored is None:
        return "the files it was loaded from cannot be read"
    if (changed := _difference(tokenizer, stored)) is not None:
        return f"{changed} was changed"
    # One template by name, or several: the second kind is laid over only where nothing changes.
    same_template = tokenizer.chat_template == stored.chat_template
    if not same_template and not isinstance(tokenizer.chat_template, str):
        return "its chat templates were changed"
    for name, path in found.items():
        if path.resolve() != (output_dir / name).resolve():
            shutil.copyfile(path, output_dir / name)
    if not same_template:
        _lay_over(str(tokenizer.chat_template), output_dir)
    return None


def _lay_over(template: str, output_dir: Path) -> None:
    """Write a chat template where every reader looks for it: older ones read the configuration alone."""
    with (output_dir / TEMPLATE).open("w", encoding="utf-8", newline="") as file:
        file.write(template)
    config = read_json(output_dir / CONFIG)
    if "chat_template" in config:
        config["chat_template"] = template
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (output_dir / CONFIG).write_text(text, encoding="utf-8")


def _find(source: str, name: str, revision: str | None) -> Path | None:
    """Return a tokenizer's file in its folder, or in the download cache of the Hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, name, revision=revision)
    except HFValidationError:  # a folder that is gone
        return None
    return Path(found) if isinstance(found, str) else None


def _load(source: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    known = {} if revision is None else {"revision": revision}
    try:
        # No code of a repository is run: whoever trusts it has a tokenizer that transformers saves by itself.
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True, **known)
    except (OSError, ValueError):
        return None


def _difference(ours: PreTrainedTokenizerBase, stored: PreTrainedTokenizerBase) -> str | None:
    """Return what differs between a tokenizer and the one its files give, other than chat template and padding."""
    if type(ours) is not type(stored):
        return "its class"
    if len(ours) != len(stored) or ours.added_tokens_decoder != stored.added_tokens_decoder:
        return "its vocabulary"
    for name in ("eos_token", "bos_token", "unk_token"):
        if getattr(ours, name) != getattr(stored, name):
            return f"its {name}"
    # A pad token that is the end token is only a stand-in, which every loader of this package sets again.
    if ours.pad_token not in (stored.pad_token, ours.eos_token):
        return "its pad_token"
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (ours, stored)]
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder") if all(backends) else ():
        one, other = (_state(getattr(backend, part, None)) for backend in backends)
        if one != other:
            return f"its {part}"
    return None


def _state(part: Any) -> Any:
    # The Rust objects compare by identity; their pickled state is JSON.
    return None if part is None else part.__getstate__()
