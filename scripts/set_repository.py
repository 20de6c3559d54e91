"""Make every link to this repository lead to another one: python -m scripts.set_repository OWNER/NAME.

The one that counts stands in pyproject.toml; tests/unit/test_repository_name.py holds that the others agree with it.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = (
    "pyproject.toml",
    "CITATION.cff",
    "Dockerfile",
    "mkdocs.yml",
    "*.md",
    "docs/**/*.md",
    "notebooks/*.ipynb",
    "jobs/*",
    "recipes/*.yaml",
    ".github/**/*.*",
)
RAW = "https://raw.githubusercontent.com/"
HOSTS = ("https://github.com/", "https://colab.research.google.com/github/", RAW)


def repository_of(root: Path) -> str:
    """``OWNER/NAME``, as pyproject.toml has it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix(HOSTS[0])


def texts(root: Path) -> list[Path]:
    """The files that may name the repository."""
    return sorted({path for place in PLACES for path in root.glob(place) if path.is_file()})


def set_repository(root: Path, new: str) -> list[Path]:
    """Write the new name wherever the old one stands, and say in which files.

    Raises:
        SystemExit: If ``new`` is no OWNER/NAME.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", new):
        raise SystemExit(f"error: OWNER/NAME, as on GitHub, got {new!r}.")
    old, changed = repository_of(root), []
    for path in texts(root):
        before = after = path.read_text(encoding="utf-8")
        for host in HOSTS:
            after = re.sub(re.escape(host + old) + r"(?![\w-])", host + new, after)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(*(path.relative_to(ROOT) for path in set_repository(ROOT, sys.argv[1])), sep="\n")
