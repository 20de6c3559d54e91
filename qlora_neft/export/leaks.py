"""Secrets and paths of this machine in files that are going to leave it: found by file and line, before a push."""

from __future__ import annotations

import getpass
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Forms of credentials that are no word of any language: the Hub's, GitHub's, GitLab's, AWS's, Slack's, private keys.
SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{40,}|\bglpat-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b|"
    r"\bxox[abprs]-[\w-]{10,}|\bsk-(?:ant-|proj-)?[\w-]{32,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Files of nothing but tokens, which may spell any short path; a path of several folders is no token.
VOCABULARIES = {"tokenizer.json", "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}
# The author's own words in a template, which no model reads.
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
HOME = re.compile(r"(?<![\w.])(?:/home/|/Users/|[A-Za-z]:(?:\\|/)+Users(?:\\|/)+)[^\s/\\\"'<>{}|]+[^\s\"'<>{}|,;)]*")
# Login names that name nobody.
NOBODY = {"root", "user", "admin", "ubuntu", "debian", "runner", "jovyan", "colab", "docker", "node", "app", "test"}
MAX_HEADER = 100_000_000  # bytes, safetensors' own limit


@dataclass(frozen=True)
class Leak:
    """Something that stands in a file and is nobody else's business.

    Attributes:
        file: Name of the file.
        line: Counted from 1.
        text: What stands there; empty for a credential, which is not repeated.
    """

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text!r}"


def secrets_in(folder: Path) -> list[Leak]:
    """Return every credential in the files of a folder, the Hub tokens of this session among them."""
    own = set(_own_tokens())
    found = []
    for name, text in _texts(folder):
        places = [match.start() for match in SECRETS.finditer(text)]
        places += [place for token in own if (place := text.find(token)) >= 0]
        found += [Leak(name, text.count("\n", 0, place) + 1, "") for place in sorted(set(places))]
    return found


def paths_in(folder: Path, local_paths: Iterable[str] = ()) -> list[Leak]:
    """Return every path of this machine in the files of a folder.

    Besides those given, the home folder and the working folder are searched for, and in the comments of templates any
    home folder and the name of the user.

    Args:
        folder: About to be published or handed on.
        local_paths: Absolute paths that must not stand in it.
    """
    own = {str(Path.home()), str(Path.cwd()), *local_paths}
    patterns = [_pattern(path) for path in sorted(own, key=len, reverse=True) if len(path) > 1]
    return [leak for name, text in _texts(folder) for leak in _leaks(name, text, patterns)]


def is_private(text: str) -> bool:
    """Return whether a text holds a credential, or a path below the home folder or the working folder."""
    if SECRETS.search(text) or any(token in text for token in _own_tokens()) or HOME.search(text):
        return True
    own = [_pattern(path) for path in (str(Path.home()), str(Path.cwd())) if len(path) > 1]
    return any(pattern.search(text) for pattern, _ in own)


def _leaks(name: str, text: str, patterns: list[tuple[re.Pattern[str], bool]]) -> Iterator[Leak]:
    seen: set[tuple[int, str]] = set()
    matches = [
        match
        for pattern, is_long in patterns
        if is_long or name not in VOCABULARIES
        for match in pattern.finditer(text)
    ]
    spans = [(match.start(), match[0]) for match in matches]
    for comment in COMMENT.finditer(text) if "template" in text or name.endswith(".jinja") else ():
        for match in (*HOME.finditer(comment[0]), *_user().finditer(comment[0])):
            spans.append((comment.start() + match.start(), match[0]))
    for start, words in sorted(spans):
        line = text.count("\n", 0, start) + 1
        if not any(line == other and (words in longer or longer in words) for other, longer in seen):
            seen.add((line, words))
            yield Leak(name, line, words)


def _pattern(path: str) -> tuple[re.Pattern[str], bool]:
    """Return an expression for a path, and whether it has several folders.

    ``/data`` does not stand in ``huggingface.co/datasets``, nor ``/content`` in ``</content>``.
    """
    is_long = len([part for part in re.split(r"[/\\]+", path) if part and not part.endswith(":")]) > 1
    # In JSON a backslash stands twice, a slash may be escaped.
    words = re.escape(path).replace(r"\\", r"\\{1,2}").replace("/", r"\\?/")
    end = r"(?![\w-])" if is_long else r"(?=\\?/[\w.])"
    return re.compile(rf"(?<![\w.<]){words}{end}"), is_long


def _user() -> re.Pattern[str]:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in containers
        name = ""
    is_somebody = len(name) >= 3 and name.lower() not in NOBODY
    return re.compile(rf"(?<![\w]){re.escape(name)}(?![\w])" if is_somebody else r"(?!)")


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and text of every file below a folder; of weights, what their header says besides the tensors."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            yield (
                name,
                _metadata(path) if path.suffix == ".safetensors" else path.read_bytes().decode("utf-8", "replace"),
            )


def _metadata(path: Path) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < MAX_HEADER else {}
        except (ValueError, RecursionError):
            return ""  # those who read the weights say that they are damaged
    return json.dumps(header.get("__metadata__", {}), ensure_ascii=False) if isinstance(header, dict) else ""


def _own_tokens() -> list[str]:
    from huggingface_hub import get_token

    found = [os.environ.get(name, "").strip() for name in TOKEN_VARIABLES]
    # A short value is no token, and would be found in every file.
    return [token for token in [*found, get_token() or ""] if len(token) >= 8]
