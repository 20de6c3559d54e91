"""What the model will see, in a terminal: one example token by token, and what a whole data set comes to."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from ..steps import IGNORE_INDEX
from .tables import Table

LEGEND = "⟦ ⟧ the loss is taken here   ⏎ newline   ⇥ tab"  # for whoever shows examples

BROKEN = "\ufffd"  # what a decoder puts in place of bytes that are no character
MAX_GROUP = 8  # tokens of one view; a character has at most four bytes
CONTEXT = 2  # groups decoded ahead of the next, so that its leading space survives
JOINERS = "\u200c\u200d"  # invisible, but emoji and several scripts fall apart without them
BLOCKS = " ▏▎▍▌▋▊▉█"
BARS, WIDTH = 12, 80  # of the histogram, at most
LENGTHS = {"min": "shortest", **{f"p{n}": f"{n}th percentile" for n in (5, 25, 50, 75, 95, 99)}, "max": "longest"}


@dataclass(frozen=True)
class TokenView:
    """A token and its text as decoded in its place; several tokens where one character takes several.

    ``trained``: the loss is taken here. ``special``: a special token, such as an end token.
    """

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


def token_views(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int]) -> list[TokenView]:
    """Split what the tokenizer decodes a sequence to into the texts of its tokens.

    Where training begins or ends inside a character, the character stands in the later part; the earlier is empty.

    Args:
        tokenizer: Any tokenizer of transformers.
        input_ids: The sequence.
        labels: As long; -100 where no loss is taken.
    """
    ids = [int(token) for token in input_ids]
    specials = _special_ids(tokenizer)
    kinds = [(int(label) != IGNORE_INDEX, token in specials) for token, label in zip(ids, labels, strict=True)]
    walk, views, start = _Walk(tokenizer, ids), [], 0
    while start < len(ids):
        end, text = walk.take(start, _group_limit(kinds, start))
        views.append(TokenView(text, tuple(ids[start:end]), *kinds[start]))
        start = end
    return views


def render_example(console: Console, title: str, views: list[TokenView], *, show_tokens: bool = False) -> None:
    """Print a sequence as the model sees it, trained stretches between ⟦ and ⟧.

    Args:
        console: Where to.
        title: Line above.
        views: From ``token_views``.
        show_tokens: Put │ between tokens; where a bracket stands between two, it does for both.
    """
    console.print(Text(printable(title), style="bold"), soft_wrap=True, highlight=False)
    line, inside = Text(), False
    for index, view in enumerate(views):
        if view.trained != inside:
            line.append("⟦" if view.trained else "⟧", style="bold green")
        elif show_tokens and index:
            line.append("│", style="dim cyan")
        inside = view.trained
        line.append(printable(view.text), style=_style(view, odd=index % 2 == 1))
    if inside:
        line.append("⟧", style="bold green")
    console.print(line if views else Text("(no tokens)", style="dim"), soft_wrap=True, highlight=False)


def render_summary(console: Console, report: dict[str, Any]) -> None:
    """Print the sizes of a prepared data set, its lengths as bars, and what is wrong with it.

    Args:
        console: Where to.
        report: Of the data preparation: ``train``, ``eval`` (or None), ``settings``, ``warnings``, ``problems``.
    """
    parts = {"train": report["train"]} | ({"held out": report["eval"]} if report.get("eval") else {})
    cells = [_cells(part) for part in parts.values()]
    rows = [(label, *(column.get(label, "-") for column in cells)) for label in cells[0]]
    sections = [i for i, (label, *_) in enumerate(rows) if label in ("duplicates", "mean length")]
    table = Table(("", *parts), rows, title=_heading(report), sections=sections)
    console.print(table.rich(), soft_wrap=False)
    for line in _histogram_lines(report["train"], min(console.width, WIDTH)):
        console.print(Text(line), soft_wrap=True)
    for kind, style in (("warning", "yellow"), ("problem", "bold red")):
        for message in report.get(f"{kind}s") or ():
            line = Text.assemble((f"{kind}:", style), " ", printable(" ".join(str(message).splitlines())))
            console.print(line, soft_wrap=True, highlight=False)


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters and invisible ones become escapes."""
    return "".join(map(_printable_character, text))


def plural(count: int, noun: str) -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


class _Walk:
    """Goes along a sequence once and hands out its text, group by group.

    A token decoded alone loses its leading space or is part of a character, so each group is decoded behind the few
    before it, and checked against the text of the whole.
    """

    def __init__(self, tokenizer: Any, ids: list[int]) -> None:
        self.tokenizer, self.ids = tokenizer, ids
        self.whole = self.decode(0, len(ids))
        self.place = 0  # characters handed out
        self.bounds = [0]  # tokens handed out at the end of each group; the text is whole at each

    def decode(self, first: int, last: int) -> str:
        """Text of some tokens alone."""
        ids = self.ids[first:last]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""

    def take(self, start: int, limit: int) -> tuple[int, str]:
        """End and text of the group that begins at ``start`` and goes no further than ``limit``."""
        for context in dict.fromkeys((self.bounds[-CONTEXT - 1 :][0], 0)):  # few decoders look further: they get all
            before = self.decode(context, self.bounds[-1])
            for end in range(start + 1, limit + 1):
                seen = self.decode(context, end)
                if seen.startswith(before) and self._fits(seen[len(before) :], end):
                    return self._give(end, seen[len(before) :])
        if limit < len(self.ids):
            return limit, ""  # a character that ends behind a change of kind comes with what follows
        return self._give(limit, "")

    def _fits(self, piece: str, end: int) -> bool:
        if not self.whole.startswith(piece, self.place):
            return False
        if not piece.endswith(BROKEN) or end == len(self.ids):
            return True
        # Half a character, or broken (or U+FFFD itself) in the data? If half, the rest alone reads differently.
        rest = self.decode(end, len(self.ids))
        return self.whole[self.place + len(piece) :] in (rest, f" {rest}")

    def _give(self, end: int, text: str) -> tuple[int, str]:
        text = self.whole[self.place :] if end == len(self.ids) else text
        self.place += len(text)
        self.bounds.append(end)
        return end, text


def _special_ids(tokenizer: Any) -> set[int]:
    # Chat markers are special without being named as end, begin or pad token.
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}


def _group_limit(kinds: list[tuple[bool, bool]], start: int) -> int:
    if kinds[start][1]:
        return start + 1  # special tokens stand alone
    end = start + 1
    while end < min(len(kinds), start + MAX_GROUP) and kinds[end] == kinds[start]:
        end += 1
    return end


def _style(view: TokenView, *, odd: bool) -> str:
    base = "reverse magenta" if view.special else "green" if view.trained else "dim"
    return " ".join([base, *["bold"] * view.trained, *["underline"] * odd])


def _printable_character(character: str) -> str:
    if character in "\n\t":
        return "⏎\n" if character == "\n" else "⇥"
    # Format characters turn text around or hide in it; lone surrogates cannot be written to a file at all.
    if character in JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _heading(report: dict[str, Any]) -> str:
    longest = report.get("settings", {}).get("max_length")
    return plural(report["train"]["rows"], "row") + (f" of at most {plural(longest, 'token')}" if longest else "")


def _cells(part: dict[str, Any]) -> dict[str, str]:
    cells = {
        "rows": f"{part['rows']:,}",
        "tokens": f"{part['tokens']:,}",
        "trained tokens": _with_share(part["trained_tokens"], part["share_trained"]),
        "truncated": _with_share(part["truncated"], part["truncated_fraction"]),
        "dropped": f"{part['dropped']:,}",
        "duplicates": f"{part['duplicates']:,}",
    }
    lengths, waste = part["lengths"], part.get("padding_waste") or {}  # padding is known once batches are planned
    cells |= {name: _or_dash(lengths[key], ",.0f") for key, name in LENGTHS.items()}
    cells["mean length"] = _or_dash(lengths["mean"], ",.1f")
    names = {"as_run": "padding, as run", "random_batches": "padding, random batches"}
    return cells | {name: _or_dash(waste[key], ".1%") for key, name in names.items() if key in waste}


def _with_share(count: int, share: float | None) -> str:
    return f"{count:,}" if not count or share is None else f"{count:,} ({share:.1%})"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _histogram_lines(part: dict[str, Any], width: int) -> list[str]:
    edges, counts = part["histogram"]["edges"], part["histogram"]["counts"]
    if not any(counts):
        return ["no rows, so no lengths to show"]
    used = [i for i, count in enumerate(counts) if count]
    step = -(-(used[-1] - used[0] + 1) // BARS)
    starts = range(used[0], used[-1] + 1, step)  # nothing to see outside
    sums = [sum(counts[i : i + step]) for i in starts]
    labels = [_bin_label(edges[i], edges[min(i + step, len(counts))]) for i in starts]
    labels[-1] = _bin_label(edges[starts[-1]], part["lengths"]["max"] + 1)  # whether the last edge is in it or not
    names, numbers = max(map(len, labels)), len(f"{max(sums):,}")
    room = max(width - names - numbers - 4, 8)
    lines = [f"lengths in tokens ({plural(sum(counts), 'row')})"]
    for label, n in zip(labels, sums, strict=True):
        lines.append(f"{label:>{names}}  {n:>{numbers},}  {_bar(n / max(sums) * room)}".rstrip())
    return lines


def _bin_label(lower: float, upper: float) -> str:
    first, last = -int(-lower // 1), -int(-upper // 1) - 1  # whole numbers, the upper edge left out
    return f"{first:,}" if last <= first else f"{first:,} to {last:,}"


def _bar(cells: float) -> str:
    eighths = max(round(cells * 8), int(cells > 0))  # what is there is seen
    return BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8].strip()
