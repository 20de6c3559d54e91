"""The committed counts: which ways to train are counted, and how today's counts compare with them."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .arms import FAMILIES, Arm, Counts, count

FILE = Path(__file__).with_name("counts.json")
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
ROUNDING = 0.5  # bytes

_LLAMA = Arm()
_MODULES = replace(_LLAMA, arguments={"fused_lora": False, "fused_norms": False, "fused_rotary": False})
# By name: every family in the recipes' own setting, on the CPU's path and as on CUDA; then one change at a time.
ARMS: dict[str, Arm] = {
    **{family: Arm(family) for family in FAMILIES},
    **{f"{family}, as on CUDA": Arm(family, as_on_cuda=True) for family in FAMILIES},
    "llama, plain TRL": replace(_LLAMA, trainer="trl"),
    "llama, by modules": _MODULES,
    "llama, by modules, r 2, no dropout": replace(_MODULES, r=2, dropout=0.0),
    "llama, no dropout": replace(_LLAMA, dropout=0.0),
    "llama, no dropout, as on CUDA": replace(_LLAMA, dropout=0.0, as_on_cuda=True),
    "llama, r 2, no dropout": replace(_LLAMA, r=2, dropout=0.0),
    "llama, float32": replace(_LLAMA, precision="fp32"),
    "llama, checkpointing": replace(_LLAMA, checkpointing=True),
    "llama, checkpointing, as on CUDA": replace(_LLAMA, checkpointing=True, as_on_cuda=True),
    "llama, padding-free": replace(_LLAMA, padding_free=True),
    "llama, padding-free, as on CUDA": replace(_LLAMA, padding_free=True, as_on_cuda=True),
}


def record(names: list[str] | None = None) -> None:
    """Count again, all arms or the named ones, and write the file."""
    kept = json.loads(FILE.read_text(encoding="utf-8"))["counts"] if names and FILE.exists() else {}
    counts = kept | {name: rounded(count(ARMS[name])) for name in names or ARMS}
    content = {"libraries": installed(), "counts": {name: counts[name] for name in ARMS if name in counts}}
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def recorded() -> dict[str, dict[str, Any]]:
    """Return the committed counts by arm."""
    return json.loads(FILE.read_text(encoding="utf-8"))["counts"]


def recorded_with() -> dict[str, str]:
    """Return the versions of the libraries that the committed counts were made with."""
    return json.loads(FILE.read_text(encoding="utf-8"))["libraries"]


def installed() -> dict[str, str]:
    """Return the versions installed here, without builds and fixes: ``2.13``."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {name: ".".join(version.split("+")[0].split(".")[:2]) for name, version in versions.items()}


def rounded(counts: Counts) -> dict[str, Any]:
    """Return counts as they are committed: bytes to one decimal, waits by operation."""
    found = asdict(counts)
    found.pop("waits_at")
    found["bytes"] = {kind: round(value, 1) for kind, value in found["bytes"].items()}
    return found | {"kept": round(found["kept"], 1), "peak": round(found["peak"], 1)}


def rises(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the counts that have risen, each with both values."""
    found = []
    for name, (old, new) in _pairs(before, now).items():
        if new > old + (ROUNDING if name not in WHOLE else 0):
            unit = "" if name in WHOLE else " bytes a token and layer"
            found.append(f"{name}: {old:g} -> {new:g}{unit} ({new - old:+g})")
    return found


WHOLE = {"launches a layer", "waits", "waits a layer"}  # the rest are bytes


def _pairs(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return what is held, by name: the sums over kinds, since work may move from one to another."""

    def of(counts: dict[str, Any]) -> dict[str, float]:
        return {
            "moved": sum(counts["bytes"].values()),
            "launches a layer": sum(counts["launches"].values()),
            "kept for the backward pass": counts["kept"],
            "most alive in one block": counts["peak"],
            "waits": sum(counts["waits"].values()),
            "waits a layer": counts["waits_a_layer"],
        }

    old, new = of(before), of(now)
    return {name: (old[name], new[name]) for name in old}
