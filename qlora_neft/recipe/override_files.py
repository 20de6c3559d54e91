"""Files of overrides: ``@NAME`` or ``@FILE`` among a recipe's overrides stands for the lines of that file.

Those that ship with the package lie in ``recipes/overrides`` and make a recipe into what a paper did.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

MARK = "@"
FOLDER, SUFFIX = "overrides", ".txt"


def is_override(word: str) -> bool:
    """Tell an override, or a file of them, from a recipe's name."""
    return "=" in word or word.startswith(MARK)


def list_override_files(recipes: Path) -> list[str]:
    """Return the names of the files that ship with the recipes in ``recipes``, sorted."""
    return sorted(path.stem for path in (recipes / FOLDER).glob(f"*{SUFFIX}"))


def expanded(words: Sequence[str], recipes: Path) -> tuple[list[str], list[str]]:
    """Put the lines of each file in its place.

    Args:
        words: Overrides, ``section.key=value`` each, or ``@`` and the name or path of a file of them.
        recipes: The folder of the shipped recipes.

    Returns:
        The overrides in order, later ones over earlier ones; and one problem for each file that cannot be read.
    """
    overrides: list[str] = []
    problems: list[str] = []
    for word in words:
        if not word.startswith(MARK):
            overrides.append(word)
            continue
        try:
            overrides += _lines(_find(word.removeprefix(MARK), recipes))
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            problems.append(f"override {word}: {why}. {_known(word, recipes)}")
    return overrides, problems


def _find(name: str, recipes: Path) -> Path:
    """Return a file: a word that is no path is the name of a shipped one."""
    path = Path(name).expanduser()
    is_name = path.name == name and not path.suffix
    return recipes / FOLDER / f"{name}{SUFFIX}" if is_name else path


def _lines(path: Path) -> list[str]:
    """Return the overrides of a file; what follows a hash at the beginning or after white space is a comment."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def _known(word: str, recipes: Path) -> str:
    names = list_override_files(recipes)
    close = difflib.get_close_matches(word.removeprefix(MARK), names, n=1)
    hint = f"Did you mean @{close[0]}? " if close else ""
    return f"{hint}Shipped: {', '.join(MARK + name for name in names)}. A file of your own is named by its path."
