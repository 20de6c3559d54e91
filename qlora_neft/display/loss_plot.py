"""``loss.png``: train loss (under noise), clean train loss and held-out loss of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .picture import new_picture, save_picture

# Color-blind safe (Okabe-Ito), distinct in grey as well.
CURVES = (
    ("loss", "train, under noise", "#999999", "-"),
    ("clean_loss", "train, clean (no noise, no dropout)", "#0072B2", "o-"),
    ("eval_loss", "held out", "#D55E00", "s-"),
)


def plot_losses(log_history: Sequence[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw the curves of a run.

    Args:
        log_history: Log entries with ``step`` and any of ``loss``, ``clean_loss``, ``eval_loss`` (nats per token).
        path: PNG file to write.
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
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return save_picture(figure, path)


def _has_noise(log_history: Sequence[dict[str, Any]]) -> bool:
    return any("neftune_norm" in entry for entry in log_history)
