"""What is not ours on a terminal: data, answers, names and messages of others, shown and never obeyed. No torch.

A terminal obeys escape sequences: they recolor, hide and overwrite what stands there, put text on the clipboard, and
lead links elsewhere than they say. All that this package prints goes through here: lines through `echo`, everything
else through `safe_console.SafeConsole`.
"""

from __future__ import annotations

import re
import sys
import unicodedata

import click

JOINERS = "\u200c\u200d"  # invisible, but needed by emoji and several scripts


def printable(text: str) -> str:
    """Escape control characters and invisible ones; a line end and a tab get a sign of their own."""
    return text if _is_plain(text) else "".join(map(_printable_character, text))


def shown(text: str) -> str:
    """Escape as `printable` does, but leave line ends and tabs: text for a terminal."""
    if _is_plain(text):
        return text
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines)


def shown_json(text: str) -> str:
    """Escape what a terminal might obey in JSON, which stays the same JSON: such characters stand in strings alone."""
    return text if _is_plain(text) else re.sub(r"[^\n\t]", lambda match: _json_character(match[0]), text)


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a message to standard output or error."""
    click.echo(shown(text), err=err, nl=nl)


def echo_result(text: str, *, is_json: bool = False, nl: bool = True) -> None:
    """Print a result to standard output: as it is into a pipe or a file, escaped on a terminal."""
    if sys.stdout.isatty():
        text = shown_json(text) if is_json else shown(text)
    # color: Click would drop escape sequences from what goes into a file, and it would not be the answer.
    click.echo(text, nl=nl, color=True)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _printable_character(character: str) -> str:
    if character in "\n\t":
        return "⏎\n" if character == "\n" else "⇥"
    if not is_obeyed(character):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_character(character: str) -> str:
    if not is_obeyed(character):
        return character
    # Beyond the first 65,536 characters JSON writes two halves.
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def is_obeyed(character: str) -> bool:
    """Return whether a character is one that a terminal or a page obeys or hides, and does not show."""
    # Format characters reverse text or hide in it; lone surrogates cannot be written to a file at all.
    return character not in JOINERS and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
