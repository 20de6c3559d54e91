"""The model card: a receipt, from which the training can be repeated. Every line comes from a record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from ..neftune import expected_norm
from .metadata import held_out_name
from .public_recipe import TEMPLATE_FILE, data_paths, is_public, uses_template_file
from .usage import Snippet

TEMPLATE = Path(__file__).with_name("card.md.jinja")
LOSSES = (
    ("clean_train_loss", "clean train loss (no noise, no dropout; nats per token)", "{:.4f}"),
    ("held_out_loss", "held-out loss (nats per token)", "{:.4f}"),
    ("exact_match", "exact answers, held out", "{:.1%}"),
)


def render_card(
    repo_id: str,
    data: ModelCardData,
    summary: dict[str, Any],
    recipe: dict[str, Any] | None,
    config: dict[str, Any],
    snippets: list[Snippet],
    *,
    has_curves: bool,
    license_is_bases: bool,
) -> str:
    """The card's text.

    Args:
        repo_id: Where the adapter goes.
        data: Its front matter.
        summary: As `training_summary` made it.
        recipe: The public recipe, None if there is none.
        config: ``adapter_config.json``.
        snippets: How it is used.
        has_curves: Whether ``loss.png`` lies beside it.
        license_is_bases: Whether the license is that of the base, as the Hub has it.
    """
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined)
    environment.filters |= {"count": _count, "size": _size, "time": _time, "number": _number}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    body = template.render(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        base=summary["base"],
        summary=summary,
        recipe=recipe,
        config=config,
        license=data.license_name or data.license,
        noise=_noise(summary),
        losses=_losses(summary),
        held_out=held_out_name(recipe) if recipe else None,
        license_is_bases=license_is_bases,
        files_to_rerun=["recipe.yaml", *([TEMPLATE_FILE] if recipe and uses_template_file(recipe) else [])],
        unpublished_files=[path for path in data_paths(recipe) if not is_public(path)],
        snippets=snippets,
        has_curves=has_curves,
        targets=_targets(config.get("target_modules")),
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{body.strip()}\n"


def _noise(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The noise with its expected norm; None if there was none or it is not known."""
    noise = summary.get("neftune", {})
    if not (noise.get("noise_alpha") or noise.get("final_alpha")):
        return None
    return {**noise, "norm": expected_norm(noise["noise_alpha"], noise["distribution"])}


def _losses(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of a table: what, before, after; of a checkpoint what was measured last, with its step."""
    before, after, latest = (summary.get(key) or {} for key in ("before", "after", "latest"))
    rows = []
    for key, label, form in LOSSES:
        first = form.format(before[key]) if before.get(key) is not None else ""
        last = form.format(after[key]) if after.get(key) is not None else ""
        if key in latest:
            last = f"{form.format(latest[key]['value'])} (step {latest[key]['step']})"
        if first or last:
            rows.append((label, first, last))
    return rows


def _targets(modules: Any) -> str:
    """Which layers carry the adapter, each kind of layer once."""
    if isinstance(modules, str):
        return modules
    return ", ".join(sorted({name.split(".")[-1] for name in modules or []}))


def _count(value: float) -> str:
    return f"{value:,}"


def _number(value: float) -> str:
    return f"{value:g}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    minutes = math.floor(seconds / 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
