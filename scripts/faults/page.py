"""The table of faults by class, in docs/results/faults.md."""

from __future__ import annotations

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
    """Return the table: a row for each class, then what broke and what was not tried."""
    lines = ["| class of faults | tried | held | most steps taken again |", "|---|---:|---:|---:|"]
    for kind in dict.fromkeys(result.kind for result in results):
        own = [result for result in results if result.kind == kind and result.held is not None]
        most = max((result.lost for result in own), default=0)
        lines.append(f"| {kind} | {len(own)} | {sum(bool(result.held) for result in own)} | {most} |")
    broken = [f"- {r.kind}, {r.name}: {r.note}" for r in results if r.held is False]
    left = [f"- {r.kind}, {r.name}: {r.note}" for r in results if r.held is None]
    for title, listed in (("Not held:", broken), ("Not tried:", left)):
        if listed:
            lines += ["", title, "", *listed]
    minutes = sum(result.seconds for result in results) / 60
    return "\n".join(["", *lines, "", f"{len(results)} faults in {minutes:.0f} minutes.", ""])
