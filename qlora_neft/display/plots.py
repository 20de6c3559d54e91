"""Pictures of a run: its losses (``loss.png``) and the lengths of its sequences (``lengths.png``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

LogEntry = Mapping[str, float | None]  # ``step`` and what was measured there; a line of metrics.jsonl

# Okabe and Ito's palette: safe for the color-blind, distinct in grey as well.
BLUE, SKY, GREEN, ORANGE = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
VERMILION, PURPLE, YELLOW = "#D55E00", "#CC79A7", "#F0E442"
LIGHT_GREY, DARK_GREY = "#999999", "#555555"

CURVES = (  # log key, label, color, style
    ("loss", "train, under noise", LIGHT_GREY, "-"),
    ("clean_loss", "train, clean (no noise, no dropout)", BLUE, "o-"),
    ("eval_loss", "held out", VERMILION, "s-"),
)
TRAIN, HELD_OUT, MARK = SKY, VERMILION, "#000000"  # held-out data has the color it has in loss.png
PERCENTILES = (("p50", "median", ":"), ("p95", "95% of rows at most", "--"))
FAR = 1.5  # a max_length beyond this multiple of the longest row would squeeze the bars: it is named below the axis


def new_picture(title: str, size: tuple[float, float] = (8, 4.5)) -> tuple[Figure, Axes] | None:
    """Return a new figure and its axes; None if matplotlib is not installed (extra ``plots``).

    Args:
        title: Heading.
        size: Width and height in inches.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # Not pyplot, which keeps every figure alive and looks for a window system.
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, parse_math=False)  # a path may hold dollar signs
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_picture(figure: Figure, path: Path) -> bool:
    """Write a PNG. Returns True, for callers that report whether there is a picture."""
    with whole_file(path) as draft:
        figure.savefig(draft, format="png")
    return True


def plot_losses(log_history: Sequence[LogEntry], path: Path, title: str) -> bool:
    """Draw the loss curves of a run.

    Args:
        log_history: Log entries with ``step`` and any of ``loss``, ``clean_loss``, ``eval_loss`` (nats per token);
            ``kept_step`` is marked.
        path: The PNG file.
        title: Heading.

    Returns:
        False if matplotlib is not installed (extra ``plots``); nothing is written then.
    """
    picture = new_picture(title)
    if picture is None:
        return False
    figure, axes = picture
    for key, label, color, style in CURVES:
        points = [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
        if points:
            name = label.replace(", under noise", "") if not _has_noise(log_history) else label
            axes.plot(*zip(*points, strict=True), style, color=color, label=name, markersize=4, linewidth=1.6)
    _mark_kept(axes, log_history)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return save_picture(figure, path)


def _mark_kept(axes: Axes, log_history: Sequence[LogEntry]) -> None:
    """Mark the step whose weights are the result, where held-out rows decided it."""
    step = next((entry["kept_step"] for entry in reversed(log_history) if entry.get("kept_step") is not None), None)
    if step is not None:
        axes.axvline(step, color=DARK_GREY, linestyle=":", linewidth=1.4, label=f"weights of step {step:g}")


def _has_noise(log_history: Sequence[LogEntry]) -> bool:
    return any("neftune_norm" in entry for entry in log_history)


def plot_lengths(report: Mapping[str, Any], path: Path, title: str) -> bool:
    """Draw the sequence lengths of a prepared data set.

    Args:
        report: As `prepare_data` made it; ``train``, ``eval`` and ``settings`` are read.
        path: The PNG file.
        title: Heading.

    Returns:
        False if matplotlib is not installed (extra ``plots``); nothing is written then.
    """
    picture = new_picture(title)
    if picture is None:
        return False
    figure, axes = picture
    _draw_parts(axes, report)
    _draw_marks(axes, report)
    axes.set_xlim(left=max(0, axes.get_xlim()[0]))
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)  # below the axes, where it covers no bar
    return save_picture(figure, path)


def _draw_parts(axes: Axes, report: Mapping[str, Any]) -> None:
    train, held_out = report["train"], report.get("eval")
    both = bool(held_out) and any(held_out["histogram"]["counts"])
    # The unit of the axis is the width of a bin, which a part without rows does not have.
    first = train if any(train["histogram"]["counts"]) else held_out if both else None
    if first is None:
        axes.text(0.5, 0.5, "no rows", ha="center", va="center", transform=axes.transAxes, color=DARK_GREY)
        axes.set(xlabel="tokens in a sequence", ylabel="rows", xticks=[], yticks=[])
        return
    edges = first["histogram"]["edges"]
    width = (edges[-1] - edges[0]) / (len(edges) - 1)
    if first is train:
        axes.stairs(*_heights(train, width, both), fill=True, color=TRAIN, label=_label("train", train))
    if both:
        label = _label("held out", held_out)
        axes.stairs(*_heights(held_out, width, both), color=HELD_OUT, linewidth=1.8, label=label)
    unit = "token" if width == 1 else f"{width:,.4g} tokens"
    axes.set(ylabel=f"{'% of rows' if both else 'rows'} per {unit}")
    axes.margins(x=max(0.02, 0.5 / len(edges)))  # a single bar keeps space beside it
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        # Rows and tokens are whole: no ticks between.
        locator = cast("MaxNLocator", axis.get_major_locator())  # upstream's annotation names its base class
        locator.set_params(integer=True, min_n_ticks=1)
        axis.set_major_formatter("{x:,.0f}")


def _heights(part: Mapping[str, Any], width: float, share: bool) -> tuple[list[float], list[float]]:
    """Return heights and edges of the bars; as shares, parts of any size and bin width can be compared."""
    edges, counts = part["histogram"]["edges"], part["histogram"]["counts"]
    scale = 100 / sum(counts) if share else 1.0
    # Counts per bin become heights per `width` tokens, the unit of the first part drawn.
    widths = (after - before for before, after in pairwise(edges))
    return [n * scale * width / (own or 1) for n, own in zip(counts, widths, strict=True)], edges


def _label(name: str, part: Mapping[str, Any]) -> str:
    rows = f"{part['rows']:,} row" + "s" * (part["rows"] != 1)
    share = part.get("share_trained")
    return f"{name}: {rows}" + (f", {share:.0%} of tokens trained" if share is not None else "")


def _draw_marks(axes: Axes, report: Mapping[str, Any]) -> None:
    lengths = report["train"]["lengths"]
    for key, name, style in PERCENTILES:
        if lengths.get(key) is not None:
            axes.axvline(lengths[key], color=MARK, linestyle=style, linewidth=1.2, label=f"{name}: {lengths[key]:,.0f}")
    limit, cut = report.get("settings", {}).get("max_length"), report["train"]["truncated"]
    label = "tokens in a sequence"
    if limit and lengths.get("max") is not None:
        note = f"max_length {limit:,}: {cut:,} row{'s' * (cut != 1)} truncated"
        if limit <= FAR * lengths["max"]:
            axes.axvline(limit, color=MARK, linewidth=1.6, label=note)
        else:
            label += f" ({note})"
    axes.set_xlabel(label)
