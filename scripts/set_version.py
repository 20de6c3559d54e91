"""Make the next release of what stands under "Unreleased": python -m scripts.set_version X.Y.Z [YYYY-MM-DD]

Writes the version wherever it is stated, and moves the change log's unreleased lines under it, heading by heading. Run
again with the same version, it adds what has come since; tests/unit/test_packaging.py holds that all places agree.
"""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

from .set_repository import ROOT, repository_of

# Each has one line that states the version, between these two pieces.
STATED = {
    "pyproject.toml": ('\nversion = "', '"'),
    "qlora_neft/__init__.py": ('\n__version__ = "', '"'),
    "CITATION.cff": ("\nversion: ", "\n"),
}
RELEASED = ("CITATION.cff", ("\ndate-released: ", "\n"))
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")  # in Keep a Changelog's order
VERSION = re.compile(r"\d+\.\d+\.\d+(?:-[0-9A-Za-z.-]+)?")
_SECTION = re.compile(r"^## \[(.+?)\](?: - ([^\n]+))?\n(.*?)(?=^## |^\[|\Z)", re.MULTILINE | re.DOTALL)


def set_version(root: Path, version: str, date: str) -> None:
    """Write a version and its date into every file that states them.

    Raises:
        SystemExit: If the version or the date is none, or a file does not state the version once.
    """
    if not VERSION.fullmatch(version):
        raise SystemExit(f"error: a semantic version (0.3.0), got {version!r}.")
    try:
        datetime.date.fromisoformat(date)
    except ValueError as error:
        raise SystemExit(f"error: a date (2026-12-31), got {date!r}.") from error
    for name, bounds in STATED.items():
        _replace(root / name, bounds, version)
    _replace(root / RELEASED[0], RELEASED[1], date)
    log = root / "CHANGELOG.md"
    log.write_text(released(log.read_text(encoding="utf-8"), version, date, repository_of(root)), encoding="utf-8")


def released(log: str, version: str, date: str, repository: str) -> str:
    """Return the change log with its unreleased lines under ``version``.

    Raises:
        SystemExit: If a heading is none of Keep a Changelog's, or no section is called Unreleased.
    """
    sections = {name: (day, entries_of(body)) for name, day, body in _SECTION.findall(log)}
    if "Unreleased" not in sections:
        raise SystemExit('error: CHANGELOG.md: there is no section "## [Unreleased]".')
    _, new = sections.pop("Unreleased")
    _, old = sections.pop(version, (date, {}))
    whole = {kind: new.get(kind, "") + old.get(kind, "") for kind in KINDS if kind in new or kind in old}
    parts = [log[: log.index("## [Unreleased]")], "## [Unreleased]\n\n", _section(version, date, whole)]
    parts += [_section(name, day, entries) for name, (day, entries) in sections.items()]
    return "".join(parts) + _links([version, *sections], repository)


def entries_of(body: str) -> dict[str, str]:
    """Return a section's lines by the heading they stand under, without blank lines around them."""
    _, *pieces = re.split(r"^### (.+)\n", body, flags=re.MULTILINE)
    found = dict(zip(pieces[::2], (piece.strip("\n") + "\n" for piece in pieces[1::2]), strict=True))
    if unknown := set(found) - set(KINDS):
        raise SystemExit(f"error: CHANGELOG.md: no heading of a change log: {', '.join(sorted(unknown))}. Use {KINDS}.")
    return {kind: text for kind, text in found.items() if text.strip()}


def _section(name: str, day: str, entries: dict[str, str]) -> str:
    return f"## [{name}] - {day}\n\n" + "".join(f"### {kind}\n{text}\n" for kind, text in entries.items())


def _links(versions: list[str], repository: str) -> str:
    """What the names in the headings link to: the changes since the last tag, and each tag's page."""
    place = f"https://github.com/{repository}"
    lines = [f"[Unreleased]: {place}/compare/v{versions[0]}...HEAD"]
    return "\n".join(lines + [f"[{version}]: {place}/releases/tag/v{version}" for version in versions]) + "\n"


def _replace(path: Path, bounds: tuple[str, str], value: str) -> None:
    text = path.read_text(encoding="utf-8")
    before, after = map(re.escape, bounds)
    text, count = re.subn(f'({before})[^\n"]+({after})', lambda found: found[1] + value + found[2], text)
    if count != 1:
        raise SystemExit(f"error: {path.name}: states the version {count} times, expected once ({bounds[0].strip()}).")
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    set_version(ROOT, sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else datetime.date.today().isoformat())
