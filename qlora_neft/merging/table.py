"""A merge's proof for a person: every strategy side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .strategies import DEQUANTIZED, NF4, ORIGINAL

MEANING = {
    DEQUANTIZED: "NF4 base, dequantized: what was trained",
    ORIGINAL: "original base",
    NF4: "quantized again, as merge_and_unload does in 4 bit",
}


def table(report: dict[str, Any]) -> list[str]:
    """The strategies' distances from the trained model, and what a merge is measured by."""
    proof = report["proof"]
    rows = [["", "KL", "top-1", "loss", ""], ["trained model", "0", "100%", f"{proof['reference_loss']:.4f}", ""]]
    for name, values in report["strategies"].items():
        mark = " <" if name == report["chosen"] else ""
        rows.append([f"{name}{mark}", *_numbers(values), MEANING[name]])
    rows.append(["no adapter", *_numbers(proof["no_adapter"]), "NF4 base alone, for comparison"])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    measured_on = f"{proof['tokens']} trained tokens of {proof['rows']} rows ({proof['rows_from']})"
    found = [f"against NF4 base + adapter in float32, on {measured_on}; KL and loss in nats per token"]
    for name, *numbers, meaning in rows:
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)), meaning]
        found.append("  ".join(cells).rstrip())
    return found


def lines(report: dict[str, Any], out: Path) -> list[str]:
    """All that is said at the end of a merge that is done."""
    size = f"{report['dtype']}, {sized(report['bytes'])}"
    if report["proof"] is None:
        return [f"{out}: merged without proof ({size})"]
    kl = report["strategies"][report["chosen"]]["kl"]
    found = [*table(report), f"{out}: merged, {report['chosen']}, {size}"]
    if kl is None or kl > report["kl_limit"]:
        measured = "not finite" if kl is None else f"{kl:.2g}, more than {report['kl_limit']:g}"
        found.append(
            f"warning: {report['chosen']} is not the model that was trained (KL {measured}). "
            f"The default, --strategy {DEQUANTIZED}, is."
        )
    return found


def sized(num_bytes: int) -> str:
    """A size as people write it."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _numbers(values: dict[str, Any]) -> list[str]:
    kl, top1, loss = (values[name] for name in ("kl", "top1", "loss"))
    return ["-" if kl is None else f"{kl:.2g}", f"{top1:.2%}", "-" if loss is None else f"{loss:.4f}"]
