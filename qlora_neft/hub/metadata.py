"""The front matter of a model card: what the Hub reads."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .public_recipe import is_hub_id, public_path

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # as `datasets` names them


def card_data(
    repo_id: str, summary: dict[str, Any], recipe: dict[str, Any] | None, license: dict[str, str]
) -> ModelCardData:
    """The front matter, in the Hub's own objects.

    Args:
        repo_id: Where the adapter goes.
        summary: As `training_summary` made it.
        recipe: The public recipe, None if there is none.
        license: ``license``, ``license_name`` and ``license_link``, empty if it is not known.
    """
    name, results = repo_id.split("/")[-1], _results(summary, recipe)
    return ModelCardData(
        library_name="peft",
        base_model=summary["base"]["id"],
        base_model_relation="adapter",
        pipeline_tag="text-generation",
        tags=tags(summary, recipe),
        datasets=_datasets(recipe) or None,
        **license,
        **({"model_name": name, "eval_results": results} if results else {}),
    )


def tags(summary: dict[str, Any], recipe: dict[str, Any] | None) -> list[str]:
    """What the adapter can be found by."""
    found = ["lora", "text-generation", f"base_model:adapter:{summary['base']['id']}"]
    if recipe is None:
        return found
    noisy = ["neftune"] if summary["neftune"]["noise_alpha"] or summary["neftune"].get("final_alpha") else []
    return ["qlora_neft", "qlora", *noisy, "bitsandbytes", recipe["quantization"]["bnb_4bit_quant_type"], *found]


def held_out_name(recipe: dict[str, Any]) -> str:
    """How readers are told which rows were held out."""
    data = recipe["data"]
    if data.get("eval_fraction") is not None:
        return f"{data['path']}, {data['eval_fraction']:.3g} of its rows, held out"
    path = data.get("eval_path") or data["path"]
    return f"{path}, split {data.get('eval_split') or 'train'}" if is_hub_id(path) else path


def _datasets(recipe: dict[str, Any] | None) -> list[str]:
    data = (recipe or {}).get("data")
    if not data:
        return []
    paths = [data["path"], *(source["path"] for source in data.get("mixture", []))]
    return list(dict.fromkeys(path for path in paths if is_hub_id(path)))


def _results(summary: dict[str, Any], recipe: dict[str, Any] | None) -> list[EvalResult]:
    """What was measured on held-out rows; after the run, or at the last evaluation before a checkpoint."""
    after = summary.get("after") or {}
    loss = after.get("held_out_loss", summary.get("latest", {}).get("held_out_loss", {}).get("value"))
    measured = [("loss", "held-out loss (nats per token)", loss)]
    measured.append(("exact_match", "exact answers (share)", after.get("exact_match")))
    if recipe is None:
        return []
    return [
        EvalResult(**_place(recipe), metric_type=kind, metric_name=name, metric_value=value)
        for kind, name, value in measured
        if value is not None
    ]


def _place(recipe: dict[str, Any]) -> dict[str, Any]:
    """Task and data of a result. Files that are not on the Hub go by the loader that reads them."""
    data = recipe["data"]
    path = data.get("eval_path") or data["path"]
    on_hub, own = is_hub_id(path), not data.get("eval_path")
    return {
        "task_type": "text-generation",
        "task_name": "Text generation",
        "dataset_type": path if on_hub else LOADERS.get(PurePath(path).suffix.lower(), "text"),
        "dataset_name": held_out_name({"data": data | {"path": public_path(data["path"])}}),
        "dataset_split": data.get("eval_split") or data["split"] if own else data.get("eval_split") or "train",
        "dataset_revision": data.get("revision") if on_hub and own else None,
    }
