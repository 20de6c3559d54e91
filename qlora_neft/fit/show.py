"""The planner's answer on a screen, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..display.picture import new_picture, save_picture
from .cards import GIB

NAMES = {
    "weights_nf4": "base weights, NF4",
    "weights_not_quantized": "embeddings, output layer, norms",
    "lora": "LoRA weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations kept",
    "live_block": "one block, alive",
    "dequantization": "unpacked NF4 weights",
    "loss_tile": "output layer and loss",
    "evaluation": "evaluation, beyond that",
    "allocator_slack": "allocator slack",
    "context": "CUDA context",
}
BAR = 44  # characters


def lines(report: Mapping[str, Any], name: str) -> list[str]:
    """The answer, line by line; at most 100 characters each, but for names."""
    card, peak, usable = report["card"], report["peak_bytes"], report["usable_bytes"]
    verdict = "fits" if report["fits"] else "does not fit"
    margin = abs(report["margin_bytes"]) / GIB
    left = f"{margin:.2f} GiB to spare" if report["fits"] else f"{margin:.2f} GiB too much"
    out = [
        f"{name}: {verdict} on {card['name']}: {peak / GIB:.2f} of {usable / GIB:.2f} GiB usable, {left}",
        f"{report['parameters']:,} weights, {report['quantized_parameters']:,} of them in NF4; "
        f"{report['lora_parameters']:,} trained",
        "",
    ]
    largest = max(report["terms"].values())
    for term, size in report["terms"].items():
        bar = "█" * round(BAR * size / largest)
        out.append(f"  {NAMES.get(term, term):<32} {size / GIB:8.3f} GiB  {bar}".rstrip())
    out += ["", f"how it would run: {_plan(report['plan'])}", _speed(report["tokens_per_second"])]
    if report.get("seconds"):
        shortest, longest = (value / 60 for value in report["seconds"])
        out.append(f"the whole run: {shortest:.0f} to {longest:.0f} minutes, by the size of the data file")
    out += [f"to make it fit: {remedy}" for remedy in report["remedies"]]
    out += [f"note: {note}" for note in report["notes"]]
    return [*out, f"confidence: {report['confidence']}"]


def picture(report: Mapping[str, Any], path: Path, title: str) -> bool:
    """A stacked bar against the card's memory, as PNG; False without matplotlib."""
    made = new_picture(title, size=(9, 3.6))
    if made is None:
        return False
    figure, axes = made
    colours = ("#0072b2", "#56b4e9", "#009e73", "#8fd3b6", "#005c43", "#e69f00", "#f0e442", "#d55e00")
    colours += ("#cc79a7", "#8c6d9e", "#bbbbbb", "#777777")
    left, paged = 0.0, bool(report["paged_out_bytes"])
    parts = list(zip(report["terms"].items(), colours, strict=False))
    # What is paged out stands last, beyond the line if need be.
    for (term, size), colour in sorted(parts, key=lambda part: paged and part[0][0] == "optimizer"):
        width, out = size / GIB, paged and term == "optimizer"
        label = f"{NAMES.get(term, term)} {width:.2f}" + " (paged to the host)" * out
        axes.barh(0, width, left=left, color=colour, edgecolor="white", hatch="//" if out else None, label=label)
        left += width
    card = report["card"]
    axes.axvline(card["memory"] / GIB, color="black", linewidth=2)
    axes.axvline(report["usable_bytes"] / GIB, color="black", linewidth=1, linestyle="--")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(card["memory"] / GIB, 0.47, card["name"], va="bottom", ha="right", bbox=box)
    axes.set(yticks=[], xlabel="GiB", ylim=(-0.5, 0.6), xlim=(0, 1.08 * max(left, card["memory"] / GIB)))
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return save_picture(figure, path)


def _plan(plan: Mapping[str, Any]) -> str:
    tokens, rows = plan["max_tokens_per_micro_batch"], plan["per_device_train_batch_size"]
    limits = [f"{tokens} tokens"] * (tokens != "auto") + [f"{rows} rows"] * (rows != "auto")
    checkpointing = {True: "on", False: "off"}.get(plan["activation_checkpointing"], "in some blocks")
    eval_rows = plan["per_device_eval_batch_size"]
    evaluation = "" if eval_rows == "auto" else f", evaluation {eval_rows} rows at a time"
    return (
        f"{plan['precision']}, micro-batches of at most {' and '.join(limits)}, activation checkpointing "
        f"{checkpointing}{evaluation}"
    )


def _speed(speed: Any) -> str:
    if speed is None:
        return "speed: not known for this card"
    low, high = speed
    return (
        f"speed: {low:,} to {high:,} tokens a second by the datasheet, a million tokens in {1e6 / high / 60:.0f} to "
        f"{1e6 / low / 60:.0f} minutes; not measured"
    )
