"""The commands that README and docs/ show: those in fenced blocks, and `qlora-neft ...` within a line."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS = ("qlora-neft", "make", "pip", "torchrun", "accelerate", "hf", "sky", "llama-", "ollama", "python")
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`(qlora-neft [^`]+)`(?!`)")
SHELL = ("", "bash", "sh", "shell", "console")


@dataclass(frozen=True)
class Shown:
    """One command.

    Attributes:
        text: As shown, lines joined, without its comment and without what a shell does around it.
        page: The first page that shows it.
        fenced: Whether it stands in a block, to be copied; else it is mentioned in a sentence.
    """

    text: str
    page: str
    fenced: bool

    @property
    def words(self) -> list[str]:
        """As the program gets them."""
        return shlex.split(self.text)

    @property
    def is_ours(self) -> bool:
        """Whether it is the command line of this package, also under a launcher."""
        return self.words[0] == "qlora-neft" or "qlora_neft" in self.words


def shown_commands() -> list[Shown]:
    """Every command once, in the order of the pages; those of blocks win over mentions."""
    found: dict[str, Shown] = {}
    for fenced in (True, False):
        for page in PAGES:
            name = page.relative_to(ROOT).as_posix()
            text = page.read_text(encoding="utf-8")
            for command in _in_blocks(text) if fenced else _in_lines(text):
                found.setdefault(command, Shown(command, name, fenced))
    return list(found.values())


def _in_blocks(text: str) -> list[str]:
    found = []
    for _, language, body in BLOCK.findall(text):
        lines = body.replace("\\\n", " ").splitlines() if language in SHELL else []
        for line in lines:
            for part in _parts(_without_comment(line).removeprefix("$ ")):
                if part.strip().startswith(PROGRAMS) and not re.match(r"\S+:", part.strip()):
                    found.append(" ".join(part.split()))
    return found


def _parts(line: str) -> list[str]:
    """Commands between `&&`, but not within quotes: there they are what another machine runs."""
    return [line] if '"' in line.partition("&&")[0] else line.split("&&")


def _in_lines(text: str) -> list[str]:
    """Mentions in sentences, and commands within the quotes of another command."""
    quoted = [part for words in re.findall(r'bash -c "([^"]+)"', text) for part in words.split("&&")]
    found = INLINE.findall(BLOCK.sub("", text)) + [
        part for part in quoted if "qlora-neft " in part and "pip" not in part
    ]
    return [" ".join(command.split()) for command in found]


def _without_comment(line: str) -> str:
    return re.sub(r"\s+#.*", "", line).strip()
