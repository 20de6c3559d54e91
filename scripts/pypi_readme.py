"""The build's hook that makes PyPI's page of README.md: relative links and pictures, dead there, lead to the release.

Run by hatchling while it builds, without this package and its dependencies (``tool.hatch.metadata.hooks.custom``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# The target of a Markdown link or picture that is neither an address nor an anchor of the page itself.
RELATIVE = re.compile(r"(?P<picture>!?)\[(?P<text>[^\[\]]*)\]\((?!https?://|mailto:|#)(?P<path>[^)\s]+)\)")
FENCED = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)


def with_absolute_links(text: str, repository: str, tag: str) -> str:
    """Return Markdown whose relative links lead to files of a release.

    Args:
        text: The page; what stands in fenced blocks is left as it is.
        repository: The repository's address on GitHub.
        tag: Of the release, so that a version's page shows that version's documents for good.
    """
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")

    def absolute(found: re.Match[str]) -> str:
        place = f"{raw}/{tag}" if found["picture"] else f"{repository}/blob/{tag}"
        return f"{found['picture']}[{found['text']}]({place}/{found['path']})"

    pieces = FENCED.split(text)  # every second one is a block
    return "".join(piece if i % 2 else RELATIVE.sub(absolute, piece) for i, piece in enumerate(pieces))


class ReadmeHook(MetadataHookInterface):
    """Sets ``readme``, which ``dynamic`` in pyproject.toml leaves to the build."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Read README.md beside pyproject.toml."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        page = with_absolute_links(text, metadata["urls"]["Repository"], f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": page}
