"""Which of llama.cpp's ways to split text a ``tokenizer.json`` describes. Only exact descriptions count.

The names and what stands behind them: ``src/llama-vocab.cpp`` of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from typing import Any

# The regular expressions of Llama 3 and of Qwen2 as their tokenizer.json have them; they differ in how many digits
# stay together.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"
# By expression, and by whether whole words are looked up before merging: llama.cpp ties that to the name.
_BY_REGEX = {(_LLAMA3, True): "llama-bpe", (_LLAMA3, False): "dbrx", (_QWEN2, False): "qwen2"}
_DIGITS = {"type": "Digits", "individual_digits": True}
_UNDERLINE = "\u2581"  # SentencePiece's letter for a space


def byte_level_name(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> str | None:
    """llama.cpp's name of a byte-level pre-tokenizer, None if it has none.

    Args:
        pre_tokenizer: Of ``tokenizer.json``.
        ignore_merges: Whether a word that is a token is taken whole.
    """
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer]
    last = steps[-1] or {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    uses_regex, before = last.get("use_regex", True), steps[:-1]
    if uses_regex and not ignore_merges:
        return {0: "gpt-2", 1: "smollm"}.get(len(before)) if all(step == _DIGITS for step in before) else None
    if uses_regex or len(before) != 1 or before[0].get("type") != "Split":
        return None
    split = before[0]
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return _BY_REGEX.get((split["pattern"].get("Regex"), ignore_merges))


def sentencepiece_adds_space(
    normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None
) -> tuple[bool, list[str]] | None:
    """Whether a SentencePiece tokenizer puts a space before a text, with what llama.cpp does otherwise.

    None if the two parts of ``tokenizer.json`` are not SentencePiece's.
    """
    steps = [] if normalizer is None else normalizer.get("normalizers") or [normalizer]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _UNDERLINE}
    if pre_tokenizer is None and steps == [{"type": "Prepend", "prepend": _UNDERLINE}, replace]:
        return True, []
    if pre_tokenizer is None and steps == [replace]:
        return False, []
    if steps or (pre_tokenizer or {}).get("type") != "Metaspace" or pre_tokenizer.get("split", True):
        return None
    scheme = pre_tokenizer.get("prepend_scheme", "always")
    if scheme == "first":
        return True, ["behind a special token inside a text, llama.cpp puts a space that this tokenizer does not."]
    return scheme == "always", []
