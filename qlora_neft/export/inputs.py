"""What is taken from a folder that someone else may have written: no link that leads out of it, no file under the name
of another kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..adapter.folder import CONFIG, RECIPE, SUMMARIES, WEIGHTS, AdapterFolder
from ..errors import UserInputError
from ..files import leads_out, read_json
from ..run_folder.record import RUN_FILE
from ..run_folder.tokenizer_files import FILES as TOKENIZER_FILES

CURVES = "loss.png"
# Files that an export, a merge or a GGUF reads from an adapter's folder, and for a checkpoint from its run's.
OF_ADAPTER = (CONFIG, WEIGHTS, *TOKENIZER_FILES, RECIPE, *SUMMARIES, RUN_FILE, CURVES, "data_report.json",
              "metrics.jsonl", "progress.json", "trainer_state.json")  # fmt: skip
# And from a model's. Weights may lie elsewhere: what a link to them leads to must be safetensors, or is not read.
OF_MODEL = ("config.json", "generation_config.json", "merge_report.json", "model.safetensors.index.json",
            *TOKENIZER_FILES)  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/=]+ \d+")


def refuse_links_of_adapter(folder: AdapterFolder) -> None:
    """Refuse an adapter's folder if something that is read from it lies elsewhere.

    Raises:
        UserInputError: With every such link.
    """
    refuse_links(folder.source, folder.path, OF_ADAPTER)
    if folder.is_checkpoint:
        refuse_links(folder.source, folder.path.parent, (RECIPE, RUN_FILE, "data_report.json"))


def refuse_links(source: str, folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder if one of some files in it is a link that leads out.

    Args:
        source: What messages call the folder.
        folder: The folder; it may itself be a link.
        names: Files that are going to be read.

    Raises:
        UserInputError: With every such link.
    """
    wrong = [name for name in names if (folder / name).exists() and leads_out(folder / name, folder)]
    if wrong:
        what = "is a link that leads" if len(wrong) == 1 else "are links that lead"
        raise UserInputError(
            f"{source}: {', '.join(wrong)} {what} out of the folder, to what may be any file of this machine, so it is "
            "not handed on. Put the file itself there, or remove the link."
        )


# ---- What a file should be ----


def check_tokenizer_file(path: Path) -> None:
    """Refuse a file that has a tokenizer file's name and is something else, such as a key or a list of passwords.

    Raises:
        UserInputError: If it does not parse as what its name says.
    """
    check = _CHECKS.get(path.name) or (_is_pieces if path.suffix == ".model" else _is_mapping)
    try:
        is_one = check(path)
    except (OSError, ValueError, RecursionError):
        is_one = False
    if not is_one:
        raise UserInputError(
            f"{path}: has the name of a tokenizer's file and does not hold what one holds, so it is not handed on. "
            "Copy the tokenizer again, or remove the file."
        )


def check_picture(path: Path) -> None:
    """Refuse a picture that is none.

    Raises:
        UserInputError: If it is not a PNG.
    """
    with path.open("rb") as file:
        if file.read(len(_PNG)) != _PNG:
            raise UserInputError(f"{path}: is not a picture, so it is not handed on. Remove it.")


def _is_mapping(path: Path) -> bool:
    return isinstance(read_json(path), dict)


def _is_vocabulary(path: Path) -> bool:
    content = read_json(path)
    return isinstance(content, dict) and all(type(token) is int for token in content.values())


def _is_tokenizer(path: Path) -> bool:
    content: Any = read_json(path)
    return isinstance(content, dict) and isinstance(content.get("model"), dict)


def _is_words(path: Path) -> bool:
    """One token a line, none of them twice, none of several words."""
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return len(lines) > 1 and not any(" " in line.strip() for line in lines) and len(set(lines)) > 0.9 * len(lines)


def _is_merges(path: Path) -> bool:
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return all(len(line.split(" ")) == 2 for line in lines if line and not line.startswith("#version"))


def _is_template(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return "{{" in text or "{%" in text  # any text is Jinja, but one without either writes no message


def _is_pieces(path: Path) -> bool:
    """A SentencePiece model, a protobuf that begins with its pieces, or tiktoken's lines of base64 and rank."""
    content = path.read_bytes()
    if content[:1] == b"\x0a":
        return b"\0" in content or not content.isascii()
    lines = content.split(b"\n")
    return len(content) > 0 and all(_TIKTOKEN_LINE.fullmatch(line) for line in lines if line)


_CHECKS: dict[str, Callable[[Path], bool]] = {
    "tokenizer.json": _is_tokenizer,
    "vocab.json": _is_vocabulary,
    "added_tokens.json": _is_vocabulary,
    "vocab.txt": _is_words,
    "merges.txt": _is_merges,
    "chat_template.jinja": _is_template,
}
