"""The lines a run prints before and after training, from plain values."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.bundled import PREFIX
from ..neftune import expected_norm


def noise_line(noise: Mapping[str, Any] | None) -> str:
    """What noise the run adds; ``noise`` holds ``noise_alpha``, ``distribution``, ``schedule``, ``final_alpha``."""
    if noise is None or not (noise["noise_alpha"] or noise["final_alpha"]):
        return "noise: none"
    way = "" if noise["schedule"] == "constant" else f", {noise['schedule']} to {noise['final_alpha']:g}"
    norm = expected_norm(noise["noise_alpha"], noise["distribution"])
    drawn = f"alpha {noise['noise_alpha']:g}{way}, {noise['distribution']}, norm {norm:.2f} per sequence"
    passes, size = noise["adversarial_steps"], noise["adversarial_step_size"]
    if passes == 1:
        return f"noise: NEFTune {drawn}"
    return f"noise: FreeLB {drawn}, climbing by {size:g}: {passes} passes a step, which costs {passes} times as much"


def data_lines(report: Mapping[str, Any]) -> list[str]:
    """Sources, rows and tokens of each part of the data, what was cut or left out, and what is suspicious."""
    lines = [
        f"data: {source['path']}, {source['format']}, prompt template {source['prompt_template']}"
        for source in report["sources"]
    ]
    for name in ("train", "eval"):
        if report[name] is not None:
            rows = report[name]
            cut = f", {rows['truncated']} truncated" * bool(rows["truncated"])
            gone = f", {rows['dropped']} dropped" * bool(rows["dropped"])
            share = f", {rows['share_trained']:.0%} of them trained"
            lines.append(f"{name} data: {rows['rows']} rows, {rows['tokens']} tokens{share}{cut}{gone}")
    return lines + [f"warning: {warning}" for warning in report["warnings"]]


def lines_after(output_dir: Path, base: str, steps: int, seconds: float, *, drawn: bool) -> list[str]:
    """Where everything is, and what to do next."""
    curves = f"loss curves: {output_dir / 'loss.png'}"
    here = shlex.quote(str(output_dir))
    is_local = base.startswith((PREFIX, ".", "/", "~")) or Path(base).is_dir()
    base_id = " --base-id owner/base" * is_local  # a local base is never published
    missing = "no loss.png: matplotlib is missing. Install the extra: pip install 'qlora-neft[plots]'"
    return [
        f"trained {steps} steps in {seconds:.0f} s; base weights unchanged, bit for bit",
        f"adapter, recipe, metrics and summary: {output_dir}/",
        curves if drawn else missing,
        "next:",
        f"  qlora-neft chat {here} --compare   # talk to it, beside its base",
        f"  qlora-neft merge {here} {shlex.quote(f'{output_dir}-merged')}   # a plain 16-bit model, with proof",
        f"  qlora-neft export {here} --repo-id you/name{base_id} --dry-run   # what would go to the Hub",
        "  qlora-neft cp llama2-7b-alpaca mine.yaml   # a recipe of your own",
    ]


def title(recipe: Mapping[str, Any]) -> str:
    """Over a picture: which base learned what, under how much noise."""
    alpha = (recipe["neftune"] or {}).get("noise_alpha", 0)
    return f"{recipe['model']['name_or_path']} on {recipe['data']['path']}, alpha {alpha:g}"
