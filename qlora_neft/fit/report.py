"""The planner's answer: whether a run fits, what it needs, how it would run, how fast, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..display.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW, new_picture, save_picture
from .cards import CARDS, GIB, Card
from .choose import USABLE, Choice, Wanted, choose
from .estimate import tokens_per_second
from .geometry import Geometry

CONFIDENCE = {
    True: "weights are counted to the byte; the other terms are a model, not measured on this card",
    False: "weights are counted to the byte; the other terms are a model, checked on a CPU",
}


def fit_report(
    geometry: Geometry, wanted: Wanted, card: Card, machine: Mapping[str, Any], stored: int | None = None
) -> dict[str, Any]:
    """Everything the planner has to say.

    Args:
        geometry: The base.
        wanted: What the recipe states.
        card: Where it shall run.
        machine: The recipe's ``machine`` section, to be resolved.
        stored: Weights the checkpoint really holds, None if unknown.

    Returns:
        ``fits``, ``peak_bytes``, ``usable_bytes``, ``margin_bytes``, ``paged_out_bytes``, ``terms``, ``parameters``,
        ``quantized_parameters``, ``nf4_bytes``, ``lora_parameters``, ``plan``, ``card``,
        ``tokens_per_second`` (low, high, or null), ``confidence``, ``remedies``, ``notes``.
    """
    choice, fits = choose(geometry, wanted, card)
    usable = int(USABLE * card.memory)
    speed = tokens_per_second(card, choice.operations, choice.step.tokens)
    return {
        "fits": fits,
        "peak_bytes": choice.peak_bytes,
        "usable_bytes": usable,
        "margin_bytes": usable - choice.peak_bytes,
        "paged_out_bytes": choice.paged_out,
        "terms": choice.terms,
        "parameters": geometry.parameters(),
        "quantized_parameters": geometry.quantized_parameters(),
        "nf4_bytes": geometry.nf4_bytes(wanted.double_quant),
        "lora_parameters": geometry.lora_parameters(wanted.r, wanted.target_modules),
        "plan": resolved_machine(machine, choice, card),
        "card": {"name": card.name, "memory": card.memory},
        "tokens_per_second": None if speed is None else [round(value) for value in speed],
        "confidence": CONFIDENCE[card.is_gpu],
        "remedies": [] if fits else remedies(geometry, wanted, card),
        "notes": _notes(geometry, wanted, choice, stored),
    }


def resolved_machine(machine: Mapping[str, Any], choice: Choice, card: Card) -> dict[str, Any]:
    """The recipe's machine section with the planner's choices in place of ``auto``."""
    precision = ("bf16" if card.has_bf16 else "fp16") if card.is_gpu else "fp32"
    chosen = {
        "device": "cuda" if card.is_gpu else "cpu",
        "precision": precision,
        "max_tokens_per_micro_batch": choice.tokens or "auto",
        "per_device_train_batch_size": choice.rows or "auto",
        "per_device_eval_batch_size": choice.eval_rows or "auto",
        "activation_checkpointing": choice.step.checkpointing,
    }
    return {key: chosen.get(key, value) if value == "auto" else value for key, value in machine.items()}


def remedies(geometry: Geometry, wanted: Wanted, card: Card) -> list[str]:
    """Changes that make it fit, the mildest first; then the smallest card it fits as it is."""
    found = []
    changes = (
        ("machine.activation_checkpointing=auto", {"checkpointing": None}),
        ("machine.max_tokens_per_micro_batch=auto", {"rows": None, "tokens": None}),
        ("train.optim=paged_adamw_8bit", {"optim": "paged_adamw_8bit"}),
        ("lora.r=16", {"r": min(16, wanted.r)}),
        ("data.max_length=256", {"max_length": min(256, wanted.max_length)}),
    )
    together: dict[str, Any] = {}
    said = []
    for text, change in changes:
        if all(getattr(wanted, key) == value for key, value in change.items()):
            continue
        together |= change
        said.append(text)
        alone, fits_alone = choose(geometry, replace(wanted, **change), card)
        if fits_alone:
            found.append(f"{text} makes it fit ({alone.peak_bytes / GIB:.2f} GiB)")
            continue
        found.append(f"{text} brings it to {alone.peak_bytes / GIB:.2f} GiB")
        both, fits_together = choose(geometry, replace(wanted, **together), card)
        if len(said) > 1 and fits_together:
            found.append(f"{' '.join(said)} together make it fit ({both.peak_bytes / GIB:.2f} GiB)")
            break
    enough = [other for other in CARDS.values() if choose(geometry, wanted, other)[1]]
    if enough:
        smallest = min(enough, key=lambda other: other.memory)
        found.append(f"as it is, it fits from {smallest.name} ({smallest.memory / GIB:.3g} GiB) on")
    if not found:
        found.append("no single card of the list holds it; take a smaller base")
    return found


def _notes(geometry: Geometry, wanted: Wanted, choice: Choice, stored: int | None) -> list[str]:
    notes = []
    if wanted.passes > 1:
        notes.append(
            f"FreeLB makes {wanted.passes} passes a step, which costs {wanted.passes} times as much time; any speed "
            "given here counts them"
        )
    if choice.paged_out:
        notes.append(
            f"{choice.paged_out / GIB:.2f} GiB of optimizer states are paged to the host while they are not needed, "
            "which takes time at each step"
        )
    if stored is None or stored == geometry.parameters():
        return notes
    return [
        *notes,
        f"the checkpoint holds {stored:,} weights, its configuration says {geometry.parameters():,}; the answer "
        "goes by the configuration",
    ]


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
COLORS = (BLUE, SKY, GREEN, "#8FD3B6", "#005C43", ORANGE, YELLOW, VERMILION, PURPLE, "#8C6D9E", "#BBBBBB", "#777777")


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
    left, paged = 0.0, bool(report["paged_out_bytes"])
    parts = list(zip(report["terms"].items(), COLORS, strict=False))
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
