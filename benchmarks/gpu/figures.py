"""What the results of single runs come to: speeds, ratios, shares of the ceiling, and which arms computed wrongly.

No torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .lengths import IGNORE_INDEX, distribution, rows
from .plan import ARMS, LORA, geometry
from .roofline import Ceiling, Work, lora_weights, mean_length, tokens_per_second

Parts = Mapping[str, Mapping[str, Any]]

LOSS_TOLERANCE = 0.01  # relative, of the first step's loss
GRADIENT_TOLERANCE = 0.05  # relative, L2; more is allowed where upstream's own paths are further off themselves
YARDSTICKS = ("trl-default", "unfused")  # arms whose blocks are upstream's own
BASELINE = "trl-tuned"


@dataclass(frozen=True)
class Speed:
    """Trained tokens per second of an arm on one base and one distribution, padding not counted.

    Attributes:
        median: Over all counted steps of all its runs.
        least, most: Of those steps.
        runs: The median of each run.
        forward_tokens: Tokens of a forward pass, on average.
        share: Of the ceiling, which is that of our fused arm's forward passes.
    """

    median: float
    least: float
    most: float
    runs: tuple[float, ...]
    forward_tokens: float
    share: float | None


def runs_of(parts: Parts, arm: str, base: str, lengths: str, cap_gib: float | None = None) -> list[Mapping[str, Any]]:
    """Return the results of an arm's runs, first to last."""
    wanted = {"arm": arm, "base": base, "lengths": lengths, "cap_gib": cap_gib}
    found = [part for part in parts.values() if "run" in part and wanted.items() <= part["run"].items()]
    return sorted(found, key=lambda part: part["run"]["repeat"])


def speed(parts: Parts, arm: str, base: str, lengths: str) -> Speed | None:
    """Return how fast an arm is; None if it was not measured."""
    runs = runs_of(parts, arm, base, lengths)
    if not runs:
        return None
    rates = [[t / s for t, s in zip(run["step_tokens"], run["step_seconds"], strict=True)] for run in runs]
    steps = [rate for of_run in rates for rate in of_run]
    tokens = statistics.mean(token for run in runs for token in run["step_tokens"])
    median, ceiling = statistics.median(steps), ceiling_of(parts, base, lengths)
    return Speed(
        median,
        min(steps),
        max(steps),
        tuple(statistics.median(of_run) for of_run in rates),
        tokens / runs[0]["forwards_per_step"],
        None if ceiling is None else median / ceiling,
    )


def ceiling_of(parts: Parts, base: str, lengths: str, *, checkpointing: bool = False) -> float | None:
    """Return the tokens per second that the card could reach; None before it was probed, or for tiny models."""
    card, runs = parts.get("probe"), runs_of(parts, "fused", base, lengths)
    if card is None or not runs or parts.get("identity", {}).get("tiny"):
        return None
    sizes, drawn = geometry(base), distribution(lengths)
    steps = len(runs[0]["step_tokens"])
    labels = [label for row in rows(drawn, steps, sizes["vocab_size"]) for label in row["labels"]]
    step = statistics.mean(runs[0]["step_tokens"])
    work = Work(
        tokens=round(step),
        passes=round(runs[0]["forwards_per_step"]),
        mean_length=mean_length(drawn.draw(steps)),
        labelled=sum(label != IGNORE_INDEX for label in labels) / len(labels),
        lora=lora_weights(sizes, int(LORA["r"])),
        checkpointing=checkpointing,
    )
    return tokens_per_second(sizes, work, Ceiling(card["flops"], card["bandwidth"]))


def ratio(parts: Parts, arm: str, base: str, lengths: str) -> float | None:
    """Return how many times as fast as TRL tuned an arm is."""
    one, other = speed(parts, arm, base, lengths), speed(parts, BASELINE, base, lengths)
    return None if one is None or other is None else one.median / other.median


def checks(parts: Parts) -> dict[str, Mapping[str, Any]]:
    """Return the comparison of each arm with the reference."""
    return {part["run"]["arm"]: part["check"] for part in parts.values() if "check" in part}


def void(parts: Parts) -> dict[str, str]:
    """Return the arms that computed something else, and why: whatever their speed, it is not a result."""
    found = checks(parts)
    upstream = [found[arm]["gradient_error"] for arm in YARDSTICKS if "gradient_error" in found.get(arm, {})]
    limit = max(GRADIENT_TOLERANCE, 2 * min(upstream, default=0))
    reasons = {}
    for arm, check in found.items():
        if "problem" in check:
            continue
        # "not <=" rather than ">": it holds for NaN as well.
        if not check["loss_error"] <= LOSS_TOLERANCE:
            reasons[arm] = f"loss off by {check['loss_error']:.2%}, {LOSS_TOLERANCE:.0%} allowed"
        elif not check["gradient_error"] <= limit:
            reasons[arm] = f"gradient off by {check['gradient_error']:.1%}, {limit:.1%} allowed"
    reasons |= {
        part["run"]["arm"]: "its NF4 bytes are not those it began with"
        for part in parts.values()
        if part.get("base_unchanged") is False
    }
    return reasons | dict.fromkeys(_other_bytes(parts), "it trained on other NF4 bytes than the rest")


def _other_bytes(parts: Parts) -> set[str]:
    """Return arms whose base differs from that of the majority."""
    sums: dict[str, dict[str, int]] = {}
    for part in parts.values():
        if "run" in part:
            sums.setdefault(part["run"]["base"], {})[part["run"]["arm"]] = part["base_checksum"]
    common = {base: statistics.mode(of.values()) for base, of in sums.items()}
    return {arm for base, of in sums.items() for arm, found in of.items() if found != common[base]}


def peak(parts: Parts, run: Mapping[str, Any]) -> int | None:
    """Return what a run took of the card: reserved by the allocator, and the context; None on a CPU."""
    memory, card = run["memory"], parts.get("probe", {})
    return memory["peak_reserved_bytes"] + card["context_bytes"] if memory and "context_bytes" in card else None


def estimate_gap(parts: Parts, run: Mapping[str, Any]) -> float | None:
    """Return how far a measured peak is above the planner's estimate, relative."""
    taken, estimate = peak(parts, run), run.get("estimate")
    return None if taken is None or estimate is None else taken / estimate["peak"] - 1


def arms_in(parts: Parts) -> list[str]:
    """Return the arms that have results, in the order of the table."""
    there = {part["run"]["arm"] for part in parts.values() if "run" in part}
    return [name for name in ARMS if name in there]
