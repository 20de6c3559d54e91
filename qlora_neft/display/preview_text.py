"""A preview on a terminal: single examples token by token, and a summary of the whole data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.text import Text

from ..steps import IGNORE_INDEX
from .tables import Table
from .terminal import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEGEND = "⟦ ⟧ the loss is taken here   ⏎ newline   ⇥ tab"  # for callers that show examples
WEIGHTED = "   ⟨ ⟩ with the weight {weight:g}"
BRACKETS = {True: "⟦⟧", False: "⟨⟩"}  # by whether a token counts in full

BROKEN = "\ufffd"  # what a decoder puts in place of bytes that are not a character
MAX_GROUP = 8  # tokens per view; a character has at most four bytes
CONTEXT = 2  # groups decoded before each group, so that its leading space survives
BLOCKS = " ▏▎▍▌▋▊▉█"
BARS, WIDTH = 12, 80  # maximum size of the histogram
LENGTHS = {"min": "shortest", **{f"p{n}": f"{n}th percentile" for n in (5, 25, 50, 75, 95, 99)}, "max": "longest"}


@dataclass(frozen=True)
class TokenView:
    """A token with its text as decoded in context; several tokens if one character takes several.

    Attributes:
        text: The text; the texts of all views together are that of the sequence.
        ids: Token ids.
        trained: Whether the loss is taken here.
        special: Whether it is a special token, such as an end token.
        weight: How much it counts in the loss, where it is taken.
    """

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool
    weight: float = 1.0


def token_views(
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Sequence[int],
    labels: Sequence[int],
    weights: Sequence[float] | None = None,
) -> list[TokenView]:
    """Split the decoded text of a sequence into the texts of its tokens.

    If training begins or ends inside a character, the character belongs to the later part; the earlier one is empty.

    Args:
        tokenizer: Any tokenizer of transformers.
        input_ids: Token ids of the sequence.
        labels: A label per token; -100 where no loss is taken.
        weights: How much each token counts in the loss; None for 1.
    """
    ids = [int(token) for token in input_ids]
    specials = _special_ids(tokenizer)
    kinds = [
        (int(label) != IGNORE_INDEX, token in specials, weight)
        for token, label, weight in zip(ids, labels, weights or [1.0] * len(ids), strict=True)
    ]
    walk, views, start = _Walk(tokenizer, ids), [], 0
    while start < len(ids):
        end, text = walk.take(start, _group_limit(kinds, start))
        views.append(TokenView(text, tuple(ids[start:end]), *kinds[start]))
        start = end
    return views


def render_example(console: Console, title: str, views: list[TokenView], *, show_tokens: bool = False) -> None:
    """Print a sequence as the model sees it, trained stretches between ⟦ and ⟧.

    Args:
        console: Console to print to.
        title: Line above the sequence.
        views: Tokens, from `token_views`.
        show_tokens: Put │ between tokens, unless a bracket already separates them.
    """
    console.print(Text(printable(title), style="bold"), soft_wrap=True, highlight=False)
    line, inside = Text(), ""
    for index, view in enumerate(views):
        brackets = BRACKETS[view.weight == 1] if view.trained else ""
        if brackets != inside:
            line.append(inside[1:] + brackets[:1], style="bold green")
        elif show_tokens and index:
            line.append("│", style="dim cyan")
        inside = brackets
        line.append(printable(view.text), style=_style(view, odd=index % 2 == 1))
    line.append(inside[1:], style="bold green")
    console.print(line if views else Text("(no tokens)", style="dim"), soft_wrap=True, highlight=False)


def render_summary(console: Console, report: Mapping[str, Any]) -> None:
    """Print the sizes of a prepared data set, its lengths as bars, and its problems.

    Args:
        console: Console to print to.
        report: As `prepare_data` made it: ``train``, ``eval`` (or None), ``settings``, ``warnings``, ``problems``.
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


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 row``, ``2,000 rows``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


class _Walk:
    """Walks along a sequence once and yields its text, group by group.

    A token decoded alone may lose its leading space or be part of a character, so each group is decoded together with
    a few groups before it, and checked against the decoded whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
        self.tokenizer, self.ids = tokenizer, ids
        self.whole = self.decode(0, len(ids))
        self.place = 0  # characters taken so far
        self.bounds = [0]  # token index at the end of each group; no character is cut there

    def decode(self, first: int, last: int) -> str:
        """Decode tokens ``first`` to ``last`` alone."""
        ids = self.ids[first:last]
        if not ids:
            return ""
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast("str", text)  # a list of texts for a batch alone

    def take(self, start: int, limit: int) -> tuple[int, str]:
        """Return end and text of the group that begins at ``start`` and ends at ``limit`` at the latest."""
        for context in dict.fromkeys(
            (self.bounds[-CONTEXT - 1 :][0], 0)
        ):  # then, for the few decoders that look further back, the whole
            before = self.decode(context, self.bounds[-1])
            for end in range(start + 1, limit + 1):
                seen = self.decode(context, end)
                if seen.startswith(before) and self._fits(seen[len(before) :], end):
                    return self._give(end, seen[len(before) :])
        if limit < len(self.ids):
            return limit, ""  # a character that ends after a change of kind comes with the next group
        return self._give(limit, "")

    def _fits(self, piece: str, end: int) -> bool:
        if not self.whole.startswith(piece, self.place):
            return False
        if not piece.endswith(BROKEN) or end == len(self.ids):
            return True
        # Half a character, or U+FFFD in the data itself? After half a character the rest alone decodes differently.
        rest = self.decode(end, len(self.ids))
        return self.whole[self.place + len(piece) :] in (rest, f" {rest}")

    def _give(self, end: int, text: str) -> tuple[int, str]:
        text = self.whole[self.place :] if end == len(self.ids) else text
        self.place += len(text)
        self.bounds.append(end)
        return end, text


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    # Chat markers are special without being named as end, begin or pad token.
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}


def _group_limit(kinds: list[tuple[bool, bool, float]], start: int) -> int:
    if kinds[start][1]:
        return start + 1  # a special token is a group of its own
    end = start + 1
    while end < min(len(kinds), start + MAX_GROUP) and kinds[end] == kinds[start]:
        end += 1
    return end


def _style(view: TokenView, *, odd: bool) -> str:
    base = "reverse magenta" if view.special else "green" if view.trained else "dim"
    return " ".join([base, *["bold"] * view.trained, *["underline"] * odd])


def _heading(report: Mapping[str, Any]) -> str:
    longest = report.get("settings", {}).get("max_length")
    return plural(report["train"]["rows"], "row") + (f" of at most {plural(longest, 'token')}" if longest else "")


def _cells(part: Mapping[str, Any]) -> dict[str, str]:
    cells = {
        "rows": f"{part['rows']:,}",
        "tokens": f"{part['tokens']:,}",
        "trained tokens": _with_share(part["trained_tokens"], part["share_trained"]),
        "truncated": _with_share(part["truncated"], part["truncated_fraction"]),
        "dropped": f"{part['dropped']:,}",
        "duplicates": f"{part['duplicates']:,}",
    }
    lengths, waste = part["lengths"], part.get("padding_waste") or {}  # known once batches are planned
    cells |= {name: _or_dash(lengths[key], ",.0f") for key, name in LENGTHS.items()}
    cells["mean length"] = _or_dash(lengths["mean"], ",.1f")
    names = {"as_run": "padding, as run", "random_batches": "padding, random batches"}
    return cells | {name: _or_dash(waste[key], ".1%") for key, name in names.items() if key in waste}


def _with_share(count: int, share: float | None) -> str:
    return f"{count:,}" if not count or share is None else f"{count:,} ({share:.1%})"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _histogram_lines(part: Mapping[str, Any], width: int) -> list[str]:
    edges, counts = part["histogram"]["edges"], part["histogram"]["counts"]
    if not any(counts):
        return ["no rows, so no lengths to show"]
    used = [i for i, count in enumerate(counts) if count]
    # Bins are joined until the lines that hold any rows fit into BARS.
    step = -(-(used[-1] - used[0] + 1) // BARS)
    starts = range(used[0], used[-1] + 1, step)  # the bins outside are empty
    sums = [sum(counts[i : i + step]) for i in starts]
    labels = [_bin_label(edges[i], edges[min(i + step, len(counts))]) for i in starts]
    labels[-1] = _bin_label(edges[starts[-1]], part["lengths"]["max"] + 1)  # the last bin may include its edge
    names, numbers = max(map(len, labels)), len(f"{max(sums):,}")
    bar_width = max(width - names - numbers - 4, 8)
    lines = [f"lengths in tokens ({plural(sum(counts), 'row')})"]
    for label, n in zip(labels, sums, strict=True):
        lines.append(f"{label:>{names}}  {n:>{numbers},}  {_bar(n / max(sums) * bar_width)}".rstrip())
    return lines


def _bin_label(lower: float, upper: float) -> str:
    first, last = -int(-lower // 1), -int(-upper // 1) - 1  # integers, without the upper edge
    return f"{first:,}" if last <= first else f"{first:,} to {last:,}"


def _bar(cells: float) -> str:
    eighths = max(round(cells * 8), int(cells > 0))  # even the smallest count is visible
    return BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8].strip()
