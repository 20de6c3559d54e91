"""``KEY=V1,V2`` on the command line: which words are swept, which are plain overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SEED = "train.seed"
_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "\"'"


@dataclass(frozen=True)
class SweptKey:
    """A key and the texts of its values."""

    key: str
    values: tuple[str, ...]


def split_words(words: Sequence[str]) -> tuple[list[SweptKey], list[str], list[str]]:
    """Tell swept keys from fixed overrides.

    Args:
        words: ``section.key=value`` each; several values with commas between them make it a swept key. A comma
            inside brackets, braces or quotes belongs to the value.

    Returns:
        Swept keys, fixed overrides, and one line per word that cannot be understood.
    """
    swept: list[SweptKey] = []
    fixed: list[str] = []
    problems: list[str] = []
    for word in words:
        key, _, text = word.partition("=")
        values = split_values(text)
        if len(values) == 1:
            fixed.append(word)
        elif key == SEED:
            problems.append(f"{word}: seeds are counted from one. Write {SEED}={values[0]} --seeds {len(values)}.")
        elif "." not in key:
            problems.append(f"{word}: a whole section cannot be swept. Name a key of it, such as neftune.noise_alpha.")
        elif not all(values):
            problems.append(f"{word}: a value is empty. Write the values with one comma between two.")
        elif key in {other.key for other in swept}:
            problems.append(f"{word}: {key} is swept twice. Name all its values in one word.")
        else:
            swept.append(SweptKey(key, tuple(values)))
    for key in swept:
        if any(word.partition("=")[0] == key.key for word in fixed):
            problems.append(f"{key.key}: is swept and given one value as well. Remove one of the two.")
    return swept, fixed, problems


def split_values(text: str) -> list[str]:
    """Split at the commas that are outside of brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES and not parts[-1].strip():
            quote = character  # inside a word, a quote is an apostrophe
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
