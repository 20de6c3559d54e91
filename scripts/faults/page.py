"""The table of faults by class, in docs/results/faults.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .fault import Result

BEGIN, END = "<!-- table: python -m scripts.faults --page -->\n", "<!-- end of the table -->\n"


def write_page(page: Path, results: Sequence[Result]) -> None:
    """Replace the table of the page; the text around it is written by hand."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(before + BEGIN + table(results) + END + after, encoding="utf-8")


def table(results: Sequence[Result]) -> str:
    """Return the table: a row for each class, then what broke and why what was not tried was not."""
    lines = ["| class of faults | faults | tried | held | most steps taken again |", "|---|---:|---:|---:|---:|"]
    for kind in dict.fromkeys(result.kind for result in results):
        own = [result for result in results if result.kind == kind]
        tried = [result for result in own if result.held is not None]
        most = max((result.lost for result in tried), default=0)
        held = sum(bool(result.held) for result in tried)
        lines.append(f"| {kind} | {len(own)} | {len(tried)} | {held} | {most if tried else '-'} |")
    broken = [f"- {result.kind}, {result.name}: {result.note}" for result in results if result.held is False]
    why = Counter(result.note for result in results if result.held is None)
    left = [f"- {count} of them: {note}" for note, count in why.items()]
    for title, listed in (("Not held:", broken), ("Not tried:", left)):
        if listed:
            lines += ["", title, "", *listed]
    tried = [result for result in results if result.held is not None]
    minutes = sum(result.seconds for result in tried) / 60
    return "\n".join(["", *lines, "", f"{len(tried)} of {len(results)} faults tried, in {minutes:.0f} minutes.", ""])
