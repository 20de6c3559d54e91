"""The model card: a receipt from which the training can be repeated. Every line comes from a record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from ...display.markdown import inline, value
from ...noise.neftune import expected_norm
from ...recipe import Recipe
from ...recipe.model import lora_scale
from ...recipe.schema import Data
from .public import TEMPLATE_FILE, data_paths, is_hub_id, is_public, uses_template_file
from .records import Training
from .usage import Snippet

TEMPLATE = Path(__file__).with_name("card.md.jinja")
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # names in `datasets`
LOSSES = (
    ("clean_train_loss", "clean train loss (no noise, no dropout; nats per token)", "{:.4f}"),
    ("held_out_loss", "held-out loss (nats per token)", "{:.4f}"),
    ("exact_match", "exact answers, held out", "{:.1%}"),
)


def render_card(
    repo_id: str,
    training: Training,
    public: Recipe | None,
    config: Mapping[str, Any],
    snippets: Sequence[Snippet],
    license: Mapping[str, str],
    *,
    has_curves: bool,
    license_is_bases: bool,
) -> str:
    """Return the card's text, front matter included.

    Args:
        repo_id: Repository the adapter goes to.
        training: What is known of it.
        public: Its recipe as published, None without one.
        config: Content of ``adapter_config.json``.
        snippets: How it is used.
        license: ``license``, ``license_name`` and ``license_link``, empty if it is not known.
        has_curves: Whether ``loss.png`` lies beside the card.
        license_is_bases: Whether the license is that of the base, as the Hub has it.
    """
    # Chainable: what is not on record prints nothing, at any depth, instead of failing the export.
    # What is on record is not ours: a data file's name or a warning may hold HTML, a link or a table's bar.
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined, finalize=value
    )
    environment.filters |= {"inline": inline, "count": _count, "size": _size, "time": _time, "number": _number}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    summary, data = training.summary(), card_data(repo_id, training, public, license)
    body = template.render(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        base=summary["base"],
        summary=summary,
        recipe=public,
        config=config,
        license=data.license_name or data.license,
        noise=_noise(training, summary),
        losses=_losses(summary),
        held_out=_held_out_name(public.data) if public else None,
        license_is_bases=license_is_bases,
        files_to_rerun=["recipe.yaml", *([TEMPLATE_FILE] if public and uses_template_file(public) else [])],
        unpublished_files=[path for path in data_paths(public) if not is_public(path)],
        snippets=snippets,
        has_curves=has_curves,
        scale=_scale(config),
        targets=_targets(config.get("target_modules"), config.get("target_parameters") or []),
        counted=training.records.facts.census.lines() if training.records.facts.census else [],
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{body.strip()}\n"


# ---- Front matter ----


def card_data(repo_id: str, training: Training, public: Recipe | None, license: Mapping[str, str]) -> ModelCardData:
    """Return the front matter, in the Hub's own objects; arguments as in `render_card`."""
    results = _results(training, public)
    return ModelCardData(
        library_name="peft",
        base_model=training.base.id,
        pipeline_tag="text-generation",
        tags=_tags(training),
        datasets=_datasets(public) or None,
        # huggingface_hub demands a name with results; without them it would write a key of its own into the card.
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
        base_model_relation="adapter",
        **dict[str, Any](license),
    )


def _tags(training: Training) -> list[str]:
    """Return the tags that the adapter can be found by."""
    # The Hub's own form of tag by which a base's page lists its adapters.
    found = ["lora", "text-generation", f"base_model:adapter:{training.base.id}"]
    if training.recipe is None:
        return found
    noisy = ["neftune"] if training.noise else []
    quantization = training.recipe.quantization
    if quantization is None:
        return ["qlora_neft", *noisy, *found]
    return ["qlora_neft", "qlora", *noisy, "bitsandbytes", quantization.bnb_4bit_quant_type, *found]


def _datasets(recipe: Recipe | None) -> list[str]:
    if recipe is None:
        return []
    # Ids of the Hub alone: it rejects a card whose front matter names a local path (transformers#33922).
    paths = [recipe.data.path, *(source.path for source in recipe.data.mixture)]
    return list(dict.fromkeys(path for path in paths if is_hub_id(path)))


def _results(training: Training, recipe: Recipe | None) -> list[EvalResult]:
    """Return the measurements on held-out rows: after the run, or at the last evaluation before a checkpoint."""
    if recipe is None:
        return []
    after, latest = training.records.facts.after or {}, training.records.facts.latest or {}
    # A checkpoint has no "after"; its latest evaluation takes that place.
    loss = after.get("held_out_loss", latest.get("held_out_loss", {}).get("value"))
    measured = [("loss", "held-out loss (nats per token)", loss)]
    measured.append(("exact_match", "exact answers (share)", after.get("exact_match")))
    return [
        EvalResult(**_place(recipe.data), metric_type=kind, metric_name=name, metric_value=value)
        for kind, name, value in measured
        if value is not None
    ]


def _place(data: Data) -> dict[str, Any]:
    """Return task and data of a result. Files that are not on the Hub go by the name of the loader that reads them."""
    path = data.eval_path or data.path
    on_hub, own = is_hub_id(path), not data.eval_path
    return {
        "task_type": "text-generation",
        "task_name": "Text generation",
        "dataset_type": path if on_hub else LOADERS.get(PurePath(path).suffix.lower(), "text"),
        "dataset_name": _held_out_name(data),
        "dataset_split": data.eval_split or (data.split if own else "train"),
        # A recipe's revision is that of data.path, not of eval_path.
        "dataset_revision": data.revision if on_hub and own else None,
    }


# ---- Body ----


def _held_out_name(data: Data) -> str:
    """Say which rows were held out."""
    if data.eval_fraction is not None:
        return f"{data.path}, {data.eval_fraction:.3g} of its rows, held out"
    path = data.eval_path or data.path
    return f"{path}, split {data.eval_split or 'train'}" if is_hub_id(path) else path


def _noise(training: Training, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the noise with its expected norm, None if there was none."""
    noise = training.noise
    if noise is None:
        return None
    return {**summary["neftune"], "norm": expected_norm(noise.noise_alpha, noise.distribution)}


def _losses(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows of a table: name, before, after; for a checkpoint the last measured value, with its step."""
    before, after, latest = (summary.get(key) or {} for key in ("before", "after", "latest"))
    rows = []
    for key, label, form in LOSSES:
        first = form.format(before[key]) if before.get(key) is not None else ""
        last = form.format(after[key]) if after.get(key) is not None else ""
        if key in latest:
            # A checkpoint's last value may be older than the checkpoint, so its step is given.
            last = f"{form.format(latest[key]['value'])} (step {latest[key]['step']})"
        if first or last:
            rows.append((label, first, last))
    return rows


def _scale(config: Mapping[str, Any]) -> float | None:
    """Return what the update is multiplied by; None if modules differ in it."""
    if config.get("rank_pattern") or config.get("alpha_pattern") or not config.get("lora_alpha"):
        return None
    return lora_scale(config["lora_alpha"], config["r"], use_rslora=bool(config.get("use_rslora")))


def _targets(modules: str | Sequence[str] | None, parameters: Sequence[str]) -> str:
    """Say which layers carry the adapter, each kind of layer once; of experts, the parameters that hold them."""
    if isinstance(modules, str):
        return ", ".join([modules, *parameters])
    # A parameter of a linear layer stands for the layer.
    names = [*(modules or []), *(name.removesuffix(".weight") for name in parameters)]
    return ", ".join(sorted({name.split(".")[-1] for name in names}))


def _count(value: float) -> str:
    return f"{value:,}"


def _number(value: float) -> str:
    return f"{value:g}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    minutes = math.floor(seconds / 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
