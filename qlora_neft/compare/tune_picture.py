"""The curve of a search, as a picture and as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..display.plots import BLUE, DARK_GREY, LIGHT_GREY, SKY, VERMILION, new_picture, save_picture
from ..display.safe_console import SafeConsole
from ..display.tables import Table
from .rates import text_of
from .results_file import RateTried, TuneResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR = 12  # characters of the longest bar of the terminal's curve
HIGHEST = 1.15  # the picture ends a little above the untrained model: a rate that ruined it would flatten the rest


def draw_curve(results: TuneResults, path: Path) -> bool:
    """Draw held-out loss over the learning rate.

    Returns:
        False if matplotlib is not installed (extra ``plots``); nothing is written then.
    """
    picture = new_picture(f"{results['recipe']}: held-out loss after {results['steps']} steps")
    if picture is None:
        return False
    figure, axes = picture
    rows = [row for row in results["rates"] if row["loss"] is not None]
    axes.set_xscale("log")
    for row in results["rates"]:
        if row["loss"] is None:
            axes.axvline(row["rate"], color=VERMILION, linestyle=":", linewidth=1.4)
            axes.annotate(
                "diverged", (row["rate"], 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right"
            )
    if results["interval"] is not None:
        low, high = results["interval"]
        ends = [row["rate"] for row in results["rates"]]
        if (low, high) != (None, None):
            span = (ends[0] if low is None else low, ends[-1] if high is None else high)
            axes.axvspan(*span, color=SKY, alpha=0.25, label="the best lies here: the ends are measurably worse")
    axes.plot(
        [row["rate"] for row in rows], [row["loss"] or 0 for row in rows], "o-", color=BLUE, label="mean of seeds"
    )
    if len(results["seeds"]) > 1:
        seeds = [(row["rate"], loss) for row in rows for loss in row["losses"].values() if loss is not None]
        axes.plot(*zip(*seeds, strict=True), ".", color=DARK_GREY, alpha=0.6, label="seeds")
    else:
        axes.get_lines()[-1].set_label("held-out loss")
    untrained = results["untrained_loss"]
    if untrained is not None:
        axes.axhline(untrained, color=LIGHT_GREY, linestyle="--", label="before training")
    _limit(axes, rows, untrained)
    if results["rate"] is not None:
        axes.axvline(results["rate"], color=DARK_GREY, linestyle="-.", label=f"chosen: {text_of(results['rate'])}")
    axes.set(xlabel="learning rate", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return save_picture(figure, path)


def _limit(axes: Axes, rows: list[RateTried], untrained: float | None) -> None:
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    if untrained is None or not losses or max(losses) <= HIGHEST * untrained:
        return
    low, top = min(*losses, untrained), HIGHEST * untrained
    axes.set_ylim(low - 0.08 * (top - low), top)


def table_of(results: TuneResults) -> Table:
    """Return the curve of held-out losses as a table, its bars from the lowest loss to the untrained model's."""
    losses = [row["loss"] for row in results["rates"] if row["loss"] is not None]
    low = min(losses, default=0.0)
    high = results["untrained_loss"] if results["untrained_loss"] is not None else max(losses, default=0.0)
    rows = []
    for row in results["rates"]:
        name = text_of(row["rate"]) + (" (recipe)" if row["rate"] == results["own_rate"] else "")
        if row["loss"] is None:
            rows.append((name, "-", "", "", "diverged"))
            continue
        share = (row["loss"] - low) / (high - low) if high > low else 0.0
        bar = "█" * max(round(min(share, 1.0) * BAR), 1) + (">" if share > 1 else "")
        gap = "" if row["difference"] is None else f"{row['difference']:.3f}"
        if row["interval"] is not None:
            gap += f" [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]"
        rows.append((name, f"{row['loss']:.4f}", bar, gap, row["verdict"]))
    return Table(("rate", "loss", "", "above lowest", ""), rows, "")


def show_tuned(results: TuneResults, output_dir: Path) -> None:
    """Print the curve, what it shows, and where everything is."""
    console = SafeConsole(highlight=False)
    console.print(table_of(results).rich(framed=False))
    for line in results["sentences"]:
        console.print(line, markup=False, soft_wrap=True)
    drawn = "curve.png" if results["picture"] else "no curve.png: pip install 'qlora-neft[plots]'"
    console.print(f"{output_dir}: tune.json, {drawn}", markup=False, soft_wrap=True)
    if results["written"] is not None:
        console.print(
            f"written: {results['written']}\nnext:\n  qlora-neft train {results['written']} --output-dir out",
            markup=False,
            soft_wrap=True,
        )
