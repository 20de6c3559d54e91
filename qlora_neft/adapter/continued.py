"""Training that goes on from an adapter: its base and its LoRA settings become those of the recipe. No torch."""

from __future__ import annotations

from typing import Any

from ..errors import UserInputError
from ..files import sha256_of_file
from ..paths import resolve_bundled
from ..recipe import Recipe
from ..recipe.schema import OF_THE_ADAPTER, Lora
from .folder import WEIGHTS, AdapterFolder, find_adapter
from .names import check_names


def resolved(recipe: Recipe) -> Recipe:
    """Return a recipe with base and LoRA settings filled in from ``model.adapter``; without one the recipe itself.

    Raises:
        UserInputError: If the adapter is not found or not whole, or the recipe states another base or other settings,
            with both values.
    """
    folder = adapter_of(recipe)
    if folder is None:
        return recipe
    check_names(folder)
    lora, model, differences = _settings(folder), recipe.model, []
    base, revision = folder.recorded_base, folder.recorded_revision or "main"
    if base is None:
        raise (
            _refusal(recipe, f"{folder.source}: names no base. Write model.name_or_path.")
            if _is_open(recipe)
            else (_refusal(recipe, f"{folder.source}: names no base."))
        )
    if not _is_open(recipe) and resolve_bundled(model.name_or_path) != resolve_bundled(base):
        differences.append(("model.name_or_path", base, model.name_or_path))
    if not _is_open(recipe) and model.revision not in ("main", revision):
        differences.append(("model.revision", revision, model.revision))
    for key, value in lora.model_dump().items() if recipe.lora is not None else ():
        if (stated := getattr(recipe.lora, key)) != value and not _same_layers(key, stated, value):
            differences.append((f"lora.{key}", value, stated))
    if folder.recipe is not None:
        # Other constants give other weights, which the adapter was not trained on; so does no quantization.
        theirs, ours = folder.recipe.quantization, recipe.quantization
        if theirs is None or ours is None:
            if theirs is not ours:
                values = (None if one is None else "a section" for one in (theirs, ours))
                differences.append(("quantization", *values))
        elif theirs.bnb_4bit_use_double_quant != ours.bnb_4bit_use_double_quant:
            values = theirs.bnb_4bit_use_double_quant, ours.bnb_4bit_use_double_quant
            differences.append(("quantization.bnb_4bit_use_double_quant", *values))
    if differences:
        lines = [f"  {key}: {theirs!r} in the adapter, {ours!r} in the recipe" for key, theirs, ours in differences]
        raise UserInputError(
            f"model.adapter: {model.adapter!r} was trained with other settings than the recipe states:\n"
            + "\n".join(lines)
            + "\nRemove the keys from the recipe, to take the adapter's; lora=null removes the section."
        )
    changes = {"name_or_path": base, "revision": revision if _is_open(recipe) else model.revision}
    return recipe.model_copy(update={"model": model.model_copy(update=changes), "lora": lora})


def adapter_of(recipe: Recipe) -> AdapterFolder | None:
    """Find the adapter that a recipe goes on from; None if it begins anew.

    Raises:
        UserInputError: If there is none where it says.
    """
    if recipe.model.adapter is None:
        return None
    try:
        return find_adapter(recipe.model.adapter, revision=recipe.model.adapter_revision)
    except UserInputError as error:
        raise UserInputError(f"model.adapter: {error}") from error


def adapter_sha256(recipe: Recipe) -> str | None:
    """Hash the weights that a recipe goes on from; None if it begins anew."""
    folder = adapter_of(recipe)
    return None if folder is None else sha256_of_file(folder.path / WEIGHTS)


def _is_open(recipe: Recipe) -> bool:
    return recipe.model.name_or_path == OF_THE_ADAPTER


def _settings(folder: AdapterFolder) -> Lora:
    """Return an adapter's settings as a recipe states them."""
    config, own = folder.config, folder.recipe.lora if folder.recipe else None
    targets: Any = own.target_modules if own is not None else config.get("target_modules")
    if not isinstance(targets, list) and targets != "all-linear":
        raise UserInputError(
            f"model.adapter: {folder.source}: its target_modules are {targets!r}, which a recipe cannot state. Load it "
            "with PeftModel.from_pretrained(..., is_trainable=True) and train it with QLoRANeftTrainer."
        )
    return Lora.model_construct(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=sorted(targets) if isinstance(targets, list) else targets,
    )


def _same_layers(key: str, one: Any, other: Any) -> bool:
    """Whether two lists of layers are the same, in whatever order."""
    return key == "target_modules" and isinstance(one, list) and isinstance(other, list) and set(one) == set(other)


def _refusal(recipe: Recipe, reason: str) -> UserInputError:
    return UserInputError(f"model.adapter: {reason}")
